use std::collections::BTreeMap;
use std::fs;

use half::f16;

use super::*;
use crate::random::{self, Stream};

const COUNT: usize = 11;

fn layout(dtype: Dtype) -> Layout {
    Layout {
        views: 2,
        channels: 3,
        side: 4,
        dtype,
        classes: 5,
        records_per_shard: 4,
        scaling_factor: 0.18215,
    }
}

fn record(index: usize) -> (Vec<f32>, usize) {
    let latents = random::normal(3, Stream::Bench, 0, index as u64, 2 * 3 * 4 * 4);
    (latents, index * 3 % 5)
}

fn write(folder: &Path, dtype: Dtype, records: usize) {
    let mut writer = ShardWriter::open(folder, layout(dtype), Vec::new()).unwrap();
    push(&mut writer, records);
    writer.finish().unwrap();
}

fn push(writer: &mut ShardWriter, until: usize) {
    for index in writer.next()..until {
        let (latents, label) = record(index);
        writer.push(&latents, label).unwrap();
    }
}

fn packed(dtype: Dtype) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), dtype, COUNT);
    folder
}

fn npy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for index in 0..COUNT {
        let (latents, label) = record(index);
        write_npy(folder.path(), index, [2, 3, 4], &latents, label).unwrap();
    }
    folder
}

fn read(latents: &Latents, index: usize) -> (Vec<f32>, usize) {
    let mut values = Vec::new();
    let label = latents.read(index, 0, &mut values).unwrap();
    assert_eq!(latents.read(index, 1, &mut values).unwrap(), label);
    assert_eq!(latents.label(index).unwrap(), label);
    (values, label)
}

/// All files of a folder.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(path).unwrap())
        })
        .collect()
}

fn open_error(folder: &Path) -> String {
    Latents::open(folder).err().unwrap().to_string()
}

/// Changes one file by `change`.
fn tamper(folder: &Path, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let path = folder.join(file);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn npy_files_become_shards_bit_for_bit() {
    let (from, to) = (npy(), tempfile::tempdir().unwrap());
    let npy = Latents::open(from.path()).unwrap();
    assert_eq!((npy.count(), npy.views()), (COUNT, 2));
    assert_eq!((npy.channels(), npy.side()), (3, 4));
    assert_eq!(npy.classes().unwrap(), 5);
    npy.verify().unwrap();
    // The order of the names: 0, 1, 10, 2, ...
    let order = [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9];
    let mut writer = ShardWriter::open(to.path(), layout(Dtype::F32), Vec::new()).unwrap();
    for (index, original) in order.into_iter().enumerate() {
        let (latents, label) = read(&npy, index);
        assert_eq!((&latents, label), (&record(original).0, record(original).1));
        writer.push(&latents, label).unwrap();
    }
    writer.finish().unwrap();
    let packed = Latents::open(to.path()).unwrap();
    packed.verify().unwrap();
    assert_eq!((packed.count(), packed.views()), (COUNT, 2));
    assert_eq!((packed.channels(), packed.side()), (3, 4));
    assert_eq!(packed.classes().unwrap(), 5);
    assert_eq!(packed.scaling_factor(), Some(0.18215));
    for index in 0..COUNT {
        assert_eq!(read(&packed, index), read(&npy, index));
    }
}

#[test]
fn half_precision_rounds_to_nearest() {
    let folder = packed(Dtype::F16);
    let latents = Latents::open(folder.path()).unwrap();
    latents.verify().unwrap();
    for index in 0..COUNT {
        let (expected, label) = record(index);
        let expected: Vec<f32> = expected
            .iter()
            .map(|v| f16::from_f32(*v).to_f32())
            .collect();
        assert_eq!(read(&latents, index), (expected, label));
    }
    // A tie goes to the even neighbour: 1 + 2^-11 lies halfway between 1 and 1 + 2^-10.
    assert_eq!(f16::from_f32(1.0 + 1.0 / 2048.0).to_f32(), 1.0);
}

#[test]
fn the_bytes_are_those_the_description_states() {
    let folder = packed(Dtype::F32);
    let bytes = &files(folder.path())["shard-00002.bin"];
    // Two views of 48 numbers and the label are 388 bytes; records are 448.
    assert_eq!(bytes.len(), 64 + 3 * 448 + 4);
    assert_eq!(&bytes[..8], b"TFLATENT");
    let word = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    let header: Vec<u32> = (8..32).step_by(4).map(word).collect();
    assert_eq!(header, [1, 4, 2, 3, 4, 5]);
    assert_eq!(bytes[32..40], 0.18215f64.to_le_bytes());
    assert_eq!(
        [word(40), word(44), word(48), word(52), word(56), word(60)],
        [4, 3, 8, 0, 0, 0]
    );
    let (latents, label) = record(9);
    for (at, value) in latents.iter().enumerate() {
        assert_eq!(f32::from_bits(word(64 + 448 + 4 * at)), *value);
    }
    assert_eq!(word(64 + 448 + 384), label as u32);
    assert!(
        bytes[64 + 448 + 388..64 + 2 * 448]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_eq!(
        word(bytes.len() - 4),
        crc32fast::hash(&bytes[..bytes.len() - 4])
    );
}

#[test]
fn a_writer_killed_anywhere_makes_the_same_bytes() {
    let whole = packed(Dtype::F16);
    for killed_at in 0..=COUNT {
        let folder = tempfile::tempdir().unwrap();
        let open = || ShardWriter::open(folder.path(), layout(Dtype::F16), Vec::new()).unwrap();
        let mut writer = open();
        push(&mut writer, killed_at);
        drop(writer);
        // The remains of a writer that was killed within a shard.
        fs::write(folder.path().join(".shard-00001.bin.77-0.tmp"), "half").unwrap();
        let mut writer = open();
        // A full shard is written when the next record comes.
        assert_eq!(
            writer.next(),
            killed_at.saturating_sub(1) / 4 * 4,
            "{killed_at}"
        );
        push(&mut writer, COUNT);
        writer.finish().unwrap();
        assert!(files(folder.path()) == files(whole.path()), "{killed_at}");
    }
}

#[test]
fn a_finished_set_can_be_continued() {
    let (whole, folder) = (packed(Dtype::F16), tempfile::tempdir().unwrap());
    write(folder.path(), Dtype::F16, 6);
    assert_eq!(Latents::open(folder.path()).unwrap().count(), 6);
    let mut writer = ShardWriter::open(folder.path(), layout(Dtype::F16), Vec::new()).unwrap();
    assert_eq!(writer.next(), 6);
    push(&mut writer, 9);
    drop(writer);
    // The short shard was replaced by a full one, and the index of 6 records is gone.
    assert!(open_error(folder.path()).contains("not finished, and their writer can go on"));
    write(folder.path(), Dtype::F16, COUNT);
    assert!(files(folder.path()) == files(whole.path()));
    write(folder.path(), Dtype::F16, COUNT);
    assert!(files(folder.path()) == files(whole.path()));
}

#[test]
fn a_writer_refuses_what_does_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::open(folder.path(), layout(Dtype::F16), Vec::new()).unwrap();
    let (good, _) = record(0);
    let with = |value: f32| {
        let mut latents = good.clone();
        latents[50] = value;
        latents
    };
    for (latents, label, expected) in [
        (
            with(f32::NAN),
            0,
            "sample 0: expected finite numbers up to 6.5504e4, found NaN",
        ),
        (with(-70_000.0), 0, "found -70000"),
        (good[1..].to_vec(), 0, "expected 96 numbers, found 95"),
        (good.clone(), 5, "expected a label below 5, found 5"),
    ] {
        let message = writer.push(&latents, label).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    assert_eq!(writer.next(), 0);
    assert!(
        writer
            .finish()
            .unwrap_err()
            .to_string()
            .contains("expected records")
    );

    let write_error = |layout: Layout, names: usize| {
        let names = vec!["name".to_owned(); names];
        let error = ShardWriter::open(folder.path(), layout, names)
            .err()
            .unwrap();
        error.to_string()
    };
    let good = layout(Dtype::F16);
    let cases = [
        (
            Layout {
                views: 3,
                ..good.clone()
            },
            0,
            "1 or 2 views",
        ),
        (
            Layout {
                side: 0,
                ..good.clone()
            },
            0,
            "above 0",
        ),
        (
            Layout {
                side: 1 << 40,
                ..good.clone()
            },
            0,
            "less than 4 GiB",
        ),
        (
            Layout {
                classes: 0,
                ..good.clone()
            },
            0,
            "classes",
        ),
        (
            Layout {
                scaling_factor: f64::NAN,
                ..good.clone()
            },
            0,
            "scaling_factor",
        ),
        (
            good.clone(),
            4,
            "a name for each of 5 classes, found 4 names",
        ),
    ];
    for (layout, names, expected) in cases {
        let message = write_error(layout, names);
        assert!(message.contains(expected), "{message}");
    }

    let half = packed(Dtype::F16);
    let other = |change: fn(&mut Layout)| {
        let mut layout = layout(Dtype::F16);
        change(&mut layout);
        ShardWriter::open(half.path(), layout, Vec::new())
            .err()
            .unwrap()
            .to_string()
    };
    assert!(other(|l| l.dtype = Dtype::F32).contains("shard-00000.bin"));
    assert!(other(|l| l.scaling_factor = 1.0).contains("records a shard, each"));
    tamper(half.path(), "shard-00002.bin", |bytes| bytes[100] ^= 1);
    assert!(other(|_| ()).contains("fits its checksum"));
    fs::remove_file(half.path().join("shard-00001.bin")).unwrap();
    assert!(
        ShardWriter::open(half.path(), layout(Dtype::F16), Vec::new())
            .err()
            .map(|error| std::error::Error::source(&error).unwrap().to_string())
            .unwrap()
            .contains("shard-00001.bin is not among them")
    );
}

#[test]
fn nothing_is_read_of_a_shard_whose_bits_have_turned() {
    for at in [64, 1000] {
        let folder = packed(Dtype::F32);
        tamper(folder.path(), "shard-00001.bin", |bytes| bytes[at] ^= 1);
        let latents = Latents::open(folder.path()).unwrap();
        let mut values = Vec::new();
        latents.read(3, 0, &mut values).unwrap();
        let error = latents.read(4, 0, &mut values).unwrap_err().to_string();
        assert!(
            error.contains("shard-00001.bin: expected the checksum"),
            "{error}"
        );
    }
}

#[test]
fn damaged_shards_are_errors_that_name_them() {
    type Change = fn(&mut Vec<u8>);
    let cases: [(&str, Change, &str); 6] = [
        (
            "shard-00001.bin",
            |bytes| bytes.truncate(1000),
            "for 4 records, found 1000",
        ),
        (
            "shard-00000.bin",
            |bytes| bytes[0] = b'X',
            "beginning with TFLATENT, found \"XFLATENT\"",
        ),
        (
            "shard-00000.bin",
            |bytes| bytes[8] = 2,
            "expected version 1, found 2",
        ),
        ("shard-00000.bin", |bytes| bytes[20] = 9, "9 channels"),
        ("latents.json", |bytes| bytes.truncate(40), "JSON"),
        ("latents.json", |bytes| bytes.clear(), "JSON"),
    ];
    for (file, change, expected) in cases {
        let folder = packed(Dtype::F32);
        tamper(folder.path(), file, change);
        let message = open_error(folder.path());
        assert!(
            message.contains(file) && message.contains(expected),
            "{message}"
        );
    }
}

#[test]
fn an_index_that_contradicts_itself_is_an_error() {
    let cases = [
        (
            "\"count\": 11",
            "\"count\": 12",
            "expected 12 records, found 11",
        ),
        ("\"version\": 1", "\"version\": 7", "version 7"),
        ("\"records\": 3", "\"records\": 5", "the last of 1 to 4"),
        (
            "\"records\": 3",
            "\"records\": 2",
            "expected 11 records, found 10",
        ),
        (
            "shard-00001.bin",
            "../../secret",
            "the file name shard-00001.bin",
        ),
        ("\"views\": 2", "\"views\": 0", "1 or 2 views"),
        ("\"side\": 4", "\"side\": 4294967296", "less than 4 GiB"),
        (
            "\"classes\": 5",
            "\"classes\": 5, \"more\": 1",
            "unknown field `more`",
        ),
    ];
    for (from, to, expected) in cases {
        let folder = packed(Dtype::F32);
        let path = folder.path().join(INDEX);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let message = open_error(folder.path());
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn verify_finds_any_changed_byte() {
    let length = files(packed(Dtype::F16).path())["shard-00001.bin"].len();
    for at in (64..length).step_by(97).chain([length - 1]) {
        let folder = packed(Dtype::F16);
        tamper(folder.path(), "shard-00001.bin", |bytes| bytes[at] ^= 0x40);
        let message = Latents::open(folder.path())
            .unwrap()
            .verify()
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("shard-00001.bin: expected the checksum"),
            "{at}: {message}"
        );
    }
}

#[test]
fn a_label_that_is_no_class_is_found_when_it_is_read() {
    let folder = packed(Dtype::F32);
    // With matching checksums, as if written so.
    let mut checksums = [0; 2];
    tamper(folder.path(), "shard-00000.bin", |bytes| {
        let end = bytes.len() - 4;
        checksums[0] = crc32fast::hash(&bytes[..end]);
        bytes[64 + 384] = 5;
        checksums[1] = crc32fast::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(&checksums[1].to_le_bytes());
    });
    tamper(folder.path(), "latents.json", |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        let [before, after] = checksums.map(|checksum| format!("{checksum:08x}"));
        *bytes = text.replace(&before, &after).into_bytes();
    });
    let latents = Latents::open(folder.path()).unwrap();
    let message = latents.label(0).unwrap_err().to_string();
    assert!(
        message.contains("shard-00000.bin: expected labels below 5, found 5"),
        "{message}"
    );
    assert!(latents.read(0, 0, &mut Vec::new()).is_err());
    assert!(latents.read(1, 0, &mut Vec::new()).is_ok());
}

#[test]
fn requests_that_can_not_be_met_are_errors() {
    for folder in [packed(Dtype::F16), npy()] {
        let latents = Latents::open(folder.path()).unwrap();
        assert!(latents.label(COUNT).is_err());
        assert!(latents.read(COUNT, 0, &mut Vec::new()).is_err());
        assert!(latents.read(0, 2, &mut Vec::new()).is_err());
    }
}

#[test]
fn damaged_npy_files_are_errors_that_name_them() {
    let file = |name: &str| format!("{FEATURES}/{name}");
    let array = |descr: &str, shape: &[usize], bytes: usize| {
        [crate::npz::npy::header(descr, shape), vec![0; bytes]].concat()
    };
    let shape = [2, 3, 4, 4];
    // The first file is checked when the folder is opened, another when it is read.
    let cases = [
        (
            "0.npy",
            array("<f2", &shape, 192),
            "expected the type '<f4', found '<f2'",
        ),
        (
            "0.npy",
            array("<f4", &[2, 3, 4, 5], 480),
            "[1 or 2 views, channels, side, side]",
        ),
        (
            "0.npy",
            array("<f4", &[1 << 40, 1 << 40], 0),
            "a shape its values fill",
        ),
        ("0.npy", b"not an array".to_vec(), "expected a NumPy array"),
        ("0.npy", vec![], "expected a NumPy array"),
        (
            "3.npy",
            array("<f4", &[1, 3, 4, 4], 192),
            "the shape [2, 3, 4, 4] of the first file",
        ),
        ("3.npy", array("<f4", &shape, 380), "expected 384 bytes"),
        (
            "3.npy",
            [crate::npz::npy::header("<f4", &shape), vec![255; 384]].concat(),
            "finite latents",
        ),
    ];
    for (name, bytes, expected) in cases {
        let folder = npy();
        fs::write(folder.path().join(file(name)), bytes).unwrap();
        let message = match Latents::open(folder.path()) {
            Ok(latents) => latents.verify().unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        assert!(
            message.contains(name) && message.contains(expected),
            "{message}"
        );
    }

    let folder = npy();
    let label = [
        crate::npz::npy::header("<i8", &[1]),
        (-1i64).to_le_bytes().to_vec(),
    ]
    .concat();
    fs::write(folder.path().join(LABELS).join("7.npy"), label).unwrap();
    let latents = Latents::open(folder.path()).unwrap();
    let message = latents.classes().unwrap_err().to_string();
    assert!(
        message.contains("7.npy: expected a label in 0..2^32, found -1"),
        "{message}"
    );
    fs::remove_file(folder.path().join(LABELS).join("7.npy")).unwrap();
    assert!(open_error(folder.path()).contains("11 labels, one for each latent, found 10"));
    // As many, but of other names.
    let latents = folder.path().join(FEATURES);
    fs::remove_file(latents.join("3.npy")).unwrap();
    assert!(open_error(folder.path()).contains("for 4.npy too, found 3.npy in its place"));
}

#[test]
fn folders_of_either_form_are_recognised() {
    let folder = npy();
    let features = Latents::open(&folder.path().join(FEATURES)).unwrap();
    assert_eq!(features.count(), COUNT);
    let empty = tempfile::tempdir().unwrap();
    assert!(open_error(empty.path()).contains("found neither"));
    assert!(open_error(&empty.path().join("none")).contains("found no folder"));
    fs::create_dir_all(empty.path().join(FEATURES)).unwrap();
    assert!(open_error(empty.path()).contains("expected .npy files, found none"));
}
