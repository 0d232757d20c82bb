//! Archives of samples: round trips, and error messages.

use std::fs;

use super::*;
use crate::npz::archive::testing::{archive, npy};

fn read_error(members: &[(&str, Vec<u8>)]) -> String {
    let (_folder, path) = archive(members);
    let message = read_samples(&path).unwrap_err().to_string();
    assert!(message.contains("batch.npz"), "{message}");
    message
}

#[test]
fn what_is_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/samples.npz");
    let images = Images::new((0..24).collect(), [2, 2, 2, 3]).unwrap();
    let labels = vec![-1, i64::MAX];
    for labels in [None, Some(labels)] {
        write_samples(&path, &images, labels.as_deref()).unwrap();
        let samples = read_samples(&path).unwrap();
        assert_eq!(
            samples,
            Samples {
                images: images.clone(),
                labels
            }
        );
    }
    assert!(write_samples(&path, &images, Some(&[1])).is_err());
}

#[test]
fn errors_say_what_was_expected_and_found() {
    let pixels = || npy("|u1", &[1, 1, 2, 3], &[0; 6]);
    let cases = [
        (
            vec![("mu.npy", pixels())],
            "expected a member arr_0.npy, found only [\"mu.npy\"]",
        ),
        (
            vec![("arr_0.npy", npy("|u1", &[6], &[0; 6]))],
            "found '|u1' of shape [6]",
        ),
        (
            vec![("arr_0.npy", npy("<f4", &[1, 1, 1, 1], &[0; 4]))],
            "expected the type '|u1'",
        ),
        (
            vec![("arr_0.npy", npy("|u1", &[1, 1, 2, 3], &[0; 5]))],
            "found 5 bytes",
        ),
        (
            vec![("arr_0.npy", b"not an array".to_vec())],
            "expected a NumPy array",
        ),
        (vec![("arr_0.npy", vec![])], "expected a NumPy array"),
        (
            vec![
                ("arr_0.npy", pixels()),
                ("arr_1.npy", npy("<i8", &[2], &[0; 16])),
            ],
            "array `arr_1`: expected the shape [1]",
        ),
        (
            vec![("arr_0.npy", npy("|u1", &[1 << 44, 1 << 10, 1, 1], &[]))],
            "expected 18014398509481984 bytes for the shape",
        ),
        (
            vec![("arr_0.npy", npy("|u1", &[1 << 60, 1 << 10, 1, 1], &[]))],
            "expected a size that can be addressed",
        ),
    ];
    for (members, expected) in cases {
        let message = read_error(&members);
        assert!(message.contains(expected), "{message}\nlacks {expected}");
    }
}

#[test]
fn files_that_are_no_archives_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text.npz");
    std::fs::write(&path, "hello").unwrap();
    assert!(matches!(read_samples(&path), Err(NpzError::Io { .. })));
    assert!(read_samples(&folder.path().join("missing.npz")).is_err());
}

/// All pictures of a reader, in blocks of at most `most`.
fn blocks(path: &Path, most: usize) -> Result<Vec<Images>, NpzError> {
    let mut reader = SampleReader::open(path)?;
    std::iter::from_fn(|| reader.next_block(most).transpose()).collect()
}

#[test]
fn blocks_are_the_archive_whatever_their_size() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/npz");
    let mut archives = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "npz") {
            continue;
        }
        archives += 1;
        let whole = read_samples(&path).unwrap();
        let [count, size @ ..] = whole.images.shape();
        let reader = SampleReader::open(&path).unwrap();
        assert_eq!(reader.shape(), whole.images.shape());
        assert_eq!(reader.path(), path);
        assert_eq!(reader.labels().unwrap(), whole.labels);
        for most in [1, 2, 3, count, count + 1, usize::MAX] {
            let blocks = blocks(&path, most).unwrap();
            assert_eq!(blocks.len(), count.div_ceil(most), "{path:?} {most}");
            let pixels: Vec<&[u8]> = blocks.iter().map(Images::pixels).collect();
            assert_eq!(pixels.concat(), whole.images.pixels(), "{path:?} {most}");
            assert!(blocks.iter().all(|block| block.shape()[1..] == size));
        }
        assert_eq!(blocks(&path, 0).unwrap().len(), count);
        // Only the first few, and no more than there are.
        for few in [0, 1, 3, count + 1] {
            let mut reader = SampleReader::open(&path).unwrap().first(few);
            let few = few.min(count);
            assert_eq!(reader.shape()[0], few);
            let labels = whole.labels.as_ref().map(|labels| labels[..few].to_vec());
            assert_eq!(reader.labels().unwrap(), labels);
            let block = reader.next_block(usize::MAX).unwrap();
            let read = block.as_ref().map_or(&[][..], Images::pixels);
            assert_eq!(
                read,
                &whole.images.pixels()[..few * whole.images.image(0).len()]
            );
            assert!(reader.next_block(1).unwrap().is_none());
        }
    }
    assert_eq!(archives, 6);
}

#[test]
fn damaged_data_are_found() {
    // Stored without compression, so that a flipped bit still gives a picture, and only the
    // checksum finds it.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("batch.npz");
    let images = Images::new((0..24).collect(), [2, 2, 2, 3]).unwrap();
    write_samples(&path, &images, Some(&[1, 2])).unwrap();
    let whole = fs::read(&path).unwrap();
    let place = whole.windows(3).position(|bytes| bytes == [21, 22, 23]);
    let mut bytes = whole.clone();
    bytes[place.unwrap()] ^= 1;
    fs::write(&path, &bytes).unwrap();
    for error in [
        blocks(&path, 1).unwrap_err(),
        blocks(&path, 2).unwrap_err(),
        read_samples(&path).unwrap_err(),
    ] {
        let message = error.to_string();
        assert!(
            message.contains("`arr_0`") && message.contains("checksum"),
            "{message}"
        );
    }
    // Cut off anywhere, it is no archive.
    for length in (0..whole.len()).step_by(7) {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(SampleReader::open(&path).is_err() && read_samples(&path).is_err());
    }
    // Whichever byte is wrong, the result is an error or pictures of the stated size.
    for place in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[place] ^= 0xFF;
        fs::write(&path, &bytes).unwrap();
        for images in blocks(&path, 1).into_iter().flatten() {
            assert_eq!(images.shape()[0], 1);
        }
    }
}

#[test]
fn a_reader_refuses_what_the_archive_can_not_hold_at_once() {
    for shape in [
        [1 << 44, 1 << 10, 1, 1],
        [1 << 60, 1 << 10, 1, 1],
        [usize::MAX, 1, 1, 1],
        [2, 1, 2, 3],
    ] {
        let (_folder, path) = archive(&[("arr_0.npy", npy("|u1", &shape, &[0; 11]))]);
        let error = SampleReader::open(&path).err().unwrap().to_string();
        assert!(error.contains("batch.npz: array `arr_0`"), "{error}");
    }
    // No pixels, so no data are missing.
    let (_folder, path) = archive(&[("arr_0.npy", npy("|u1", &[0, 1 << 40, 1 << 40, 3], &[]))]);
    assert!(blocks(&path, 8).unwrap().is_empty());
    let (_folder, path) = archive(&[("arr_0.npy", npy("|u1", &[3, 0, 1 << 40, 3], &[]))]);
    assert_eq!(blocks(&path, 2).unwrap().len(), 2);
    // Excess data are not mistaken for the end of the array, where the checksum is compared.
    let (_folder, path) = archive(&[("arr_0.npy", npy("|u1", &[1, 1, 2, 3], &[7; 8]))]);
    let error = blocks(&path, 8).unwrap_err().to_string();
    assert!(error.contains("found more bytes"), "{error}");
}

#[test]
fn a_writer_takes_what_it_was_told_and_leaves_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("samples.npz");
    let some = |count: usize| Images::new(vec![1; count * 6], [count, 1, 2, 3]).unwrap();
    let turned = Images::new(vec![1; 6], [1, 2, 1, 3]).unwrap();
    let fresh = || SampleWriter::create(&path, [3, 1, 2, 3]).unwrap();
    let files = || fs::read_dir(folder.path()).unwrap().count();

    let mut writer = fresh();
    assert!(writer.push(&turned).is_err());
    writer.push(&some(2)).unwrap();
    let error = writer.push(&some(2)).unwrap_err().to_string();
    assert!(error.contains("at most 1"), "{error}");
    writer.push(&some(0)).unwrap();
    writer.push(&some(1)).unwrap();
    writer.finish(Some(&[1, 2, 3])).unwrap();
    let whole = read_samples(&path).unwrap();
    assert_eq!(whole.images, some(3));
    assert_eq!(whole.labels, Some(vec![1, 2, 3]));

    // With missing pictures or labels, the earlier file stays and nothing of the new one remains.
    let mut writer = fresh();
    writer.push(&turned).unwrap_err();
    writer.push(&some(1)).unwrap();
    assert_eq!(files(), 2);
    assert!(writer.finish(None).is_err());
    let mut writer = fresh();
    writer.push(&some(3)).unwrap();
    assert!(writer.finish(Some(&[1])).is_err());
    drop(fresh());
    assert_eq!(read_samples(&path).unwrap(), whole);
    assert_eq!(files(), 1);
    assert!(SampleWriter::create(&path, [usize::MAX, 2, 1, 1]).is_err());
}
