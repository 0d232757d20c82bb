//! Changes of files: of their bytes, or of their inner content, with lengths and checksums
//! corrected afterwards.

use std::io::{Cursor, Read, Write};

use proptest::prelude::*;

/// A position, as a share of the length.
type Place = u32;

/// One change, which applies to any content.
#[derive(Debug, Clone)]
pub enum Change {
    /// Flips bits.
    Flip(Place, u8),
    /// Cuts off the rest.
    Cut(Place),
    /// Overwrites bytes.
    Write(Place, Vec<u8>),
    /// Inserts bytes.
    Insert(Place, Vec<u8>),
    /// Removes bytes.
    Remove(Place, u16),
    /// Repeats a piece many times.
    Repeat(Place, u8, u16),
    /// Writes a number of some width and byte order that programs often fail on.
    Number(Place, u8, bool, u8),
    /// Replaces a word of a text (a number, a name, a string).
    Word(Place, u8),
    /// Nests a word in many brackets.
    Nest(Place, u8, u16),
    /// Removes, doubles or moves a line.
    Line(Place, Place, u8),
}

/// Any change.
pub fn change() -> impl Strategy<Value = Change> {
    let place = any::<Place>;
    let bytes = || proptest::collection::vec(any::<u8>(), 1..9);
    prop_oneof![
        1 => (place(), 1u8..).prop_map(|(at, bits)| Change::Flip(at, bits)),
        1 => place().prop_map(Change::Cut),
        1 => (place(), bytes()).prop_map(|(at, bytes)| Change::Write(at, bytes)),
        1 => (place(), bytes()).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        1 => (place(), 1u16..300).prop_map(|(at, count)| Change::Remove(at, count)),
        1 => (place(), 1u8..64, 1u16..).prop_map(|(at, length, times)| Change::Repeat(at, length, times)),
        1 => (place(), 0u8..4, any::<bool>(), any::<u8>())
            .prop_map(|(at, width, big, which)| Change::Number(at, width, big, which)),
        4 => (place(), any::<u8>()).prop_map(|(at, which)| Change::Word(at, which)),
        1 => (place(), any::<u8>(), 1u16..).prop_map(|(at, which, times)| Change::Nest(at, which, times)),
        1 => (place(), place(), 0u8..3).prop_map(|(at, to, how)| Change::Line(at, to, how)),
    ]
}

/// Limits of number types, and their neighbours.
const NUMBERS: [u64; 18] = [
    0,
    1,
    2,
    3,
    127,
    128,
    255,
    256,
    32_767,
    65_535,
    65_536,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    i64::MAX as u64,
    u64::MAX,
];

const WORDS: [&str; 26] = [
    "0",
    "-1",
    "1",
    "3",
    "255",
    "65536",
    "4294967296",
    "9223372036854775807",
    "18446744073709551616",
    "1e400",
    "1e-400",
    "NaN",
    "inf",
    "0.5",
    "true",
    "null",
    "\"\"",
    "\"x\"",
    "[]",
    "{}",
    "[1, 2, 3]",
    "\"../../../x\"",
    "\"/dev/zero\"",
    "\"\\u001b[2J\"",
    "\u{1b}]0;x\u{7}",
    "\0",
];

const BRACKETS: [(&str, &str); 4] = [("[", "]"), ("{", "}"), ("(", ")"), ("{\"a\":", "}")];

/// Most bytes that a change produces.
const MOST: usize = 1 << 22;

fn at(place: Place, length: usize) -> usize {
    ((u64::from(place) * length as u64) >> 32) as usize
}

/// The word that begins at or after a place; empty if there is none.
fn word(bytes: &[u8], place: Place) -> std::ops::Range<usize> {
    let of_word = |byte: u8| byte.is_ascii_alphanumeric() || b"_-+.\"'".contains(&byte);
    let start = at(place, bytes.len());
    let first = (start..bytes.len()).find(|&index| of_word(bytes[index]));
    let Some(first) = first else {
        return start..start;
    };
    let last = (first..bytes.len()).find(|&index| !of_word(bytes[index]));
    first..last.unwrap_or(bytes.len())
}

impl Change {
    fn make(&self, bytes: &mut Vec<u8>) {
        let length = bytes.len();
        match self {
            Self::Flip(place, bits) if length > 0 => bytes[at(*place, length)] ^= bits,
            Self::Cut(place) => bytes.truncate(at(*place, length)),
            Self::Write(place, new) => {
                let start = at(*place, length);
                let end = length.min(start + new.len());
                bytes[start..end].copy_from_slice(&new[..end - start]);
            }
            Self::Insert(place, new) => {
                let start = at(*place, length + 1);
                bytes.splice(start..start, new.iter().copied());
            }
            Self::Remove(place, count) => {
                let start = at(*place, length);
                bytes.drain(start..length.min(start + usize::from(*count)));
            }
            Self::Repeat(place, count, times) => {
                let start = at(*place, length);
                let end = length.min(start + usize::from(*count));
                let piece = bytes[start..end].to_vec();
                let times = usize::from(*times).min(MOST / piece.len().max(1));
                bytes.splice(start..start, piece.repeat(times));
            }
            Self::Number(place, width, big, which) => {
                let number = NUMBERS[usize::from(*which) % NUMBERS.len()];
                let width = 1 << width;
                let mut new = number.to_le_bytes()[..width].to_vec();
                if *big {
                    new.reverse();
                }
                let start = at(*place, length);
                let end = length.min(start + width);
                bytes[start..end].copy_from_slice(&new[..end - start]);
            }
            Self::Word(place, which) => {
                let word = word(bytes, *place);
                let new = WORDS[usize::from(*which) % WORDS.len()];
                bytes.splice(word, new.bytes());
            }
            Self::Nest(place, which, times) => {
                let word = word(bytes, *place);
                let (open, close) = BRACKETS[usize::from(*which) % BRACKETS.len()];
                let times = usize::from(*times);
                let inside = bytes[word.clone()].to_vec();
                let new = [
                    open.repeat(times).into_bytes(),
                    inside,
                    close.repeat(times).into_bytes(),
                ];
                bytes.splice(word, new.concat());
            }
            Self::Line(place, to, how) => {
                let mut lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
                if lines.is_empty() {
                    return;
                }
                let from = at(*place, lines.len());
                let line = lines[from];
                if how % 3 != 1 {
                    lines.remove(from);
                }
                if how % 3 != 0 {
                    lines.insert(at(*to, lines.len() + 1), line);
                }
                *bytes = lines.concat();
            }
            Self::Flip(..) => {}
        }
    }
}

fn all(changes: &[Change], bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for change in changes {
        change.make(&mut bytes);
    }
    bytes
}

/// Kinds of envelopes around a file's content.
#[derive(Debug, Clone, Copy)]
pub enum Form {
    /// None: bytes, or a text.
    Bytes,
    /// Archive members with checksums.
    Zip,
    /// A JSON header after its length.
    Safetensors,
    /// A Python header after its length.
    Npy,
    /// One stream with a checksum.
    Gzip,
    /// Chunks with checksums.
    Png,
    /// A shard of records, with a checksum at the end.
    Shard,
}

impl Form {
    /// The file, with changes of its bytes or of its content.
    pub fn changed(self, bytes: &[u8], inside: bool, changes: &[Change]) -> Vec<u8> {
        let inner = match self {
            _ if !inside => None,
            Self::Bytes => None,
            Self::Zip => zip(bytes, changes),
            Self::Safetensors => header(bytes, 8, changes),
            Self::Npy => header(bytes, 2, changes),
            Self::Gzip => gzip(bytes, changes),
            Self::Png => png(bytes, changes),
            Self::Shard => shard(bytes, changes),
        };
        inner.unwrap_or_else(|| all(changes, bytes))
    }
}

/// Index of the part to change, by the place of the first change.
fn which(changes: &[Change], count: usize) -> usize {
    let place = match changes.first() {
        Some(
            Change::Flip(place, _)
            | Change::Cut(place)
            | Change::Write(place, _)
            | Change::Insert(place, _)
            | Change::Remove(place, _)
            | Change::Repeat(place, ..)
            | Change::Number(place, ..)
            | Change::Word(place, _)
            | Change::Nest(place, ..)
            | Change::Line(place, ..),
        ) => *place,
        None => 0,
    };
    // By the remainder: otherwise, a part would only be changed at its beginning.
    place as usize % count.max(1)
}

fn zip(bytes: &[u8], changes: &[Change]) -> Option<Vec<u8>> {
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).ok()?;
    let chosen = which(changes, archive.len());
    let mut new = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for index in 0..archive.len() {
        let mut member = archive.by_index(index).ok()?;
        let name = member.name().to_owned();
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(member.compression())
            .with_alignment(64);
        let mut content = Vec::new();
        member.read_to_end(&mut content).ok()?;
        if index == chosen {
            // An array in an archive has its own header.
            content = match name.ends_with(".npy") {
                true => Form::Npy.changed(&content, changes.len() > 1, changes),
                false => all(changes, &content),
            };
        }
        new.start_file(name, options).ok()?;
        new.write_all(&content).ok()?;
    }
    Some(new.finish().ok()?.into_inner())
}

/// Changes a text after its length, of 8 bytes at the start or of 2 after NumPy's magic.
fn header(bytes: &[u8], width: usize, changes: &[Change]) -> Option<Vec<u8>> {
    let start = if width == 8 { 0 } else { 8 };
    let mut number = [0; 8];
    number[..width].copy_from_slice(bytes.get(start..start + width)?);
    let (first, length) = (start + width, u64::from_le_bytes(number) as usize);
    let text = all(changes, bytes.get(first..first.checked_add(length)?)?);
    let size = (text.len() as u64).to_le_bytes();
    Some(
        [
            &bytes[..start],
            &size[..width],
            &text,
            &bytes[first + length..],
        ]
        .concat(),
    )
}

fn gzip(bytes: &[u8], changes: &[Change]) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    flate2::read::GzDecoder::new(bytes)
        .read_to_end(&mut content)
        .ok()?;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&all(changes, &content)).ok()?;
    encoder.finish().ok()
}

fn png(bytes: &[u8], changes: &[Change]) -> Option<Vec<u8>> {
    let mut chunks = Vec::new();
    let mut rest = bytes.get(8..)?;
    while let Some((size, after)) = rest.split_first_chunk::<4>() {
        let size = u32::from_be_bytes(*size) as usize;
        chunks.push(after.get(..4 + size)?.to_vec());
        rest = after.get(4 + size + 4..)?;
    }
    let chosen = which(changes, chunks.len());
    let chunk = chunks.get_mut(chosen)?;
    let data = all(changes, &chunk[4..]);
    chunk.truncate(4);
    chunk.extend(data);
    let mut new = bytes[..8].to_vec();
    for chunk in chunks {
        new.extend((chunk.len() as u32 - 4).to_be_bytes());
        new.extend(&chunk);
        new.extend(crc32fast::hash(&chunk).to_be_bytes());
    }
    Some(new)
}

fn shard(bytes: &[u8], changes: &[Change]) -> Option<Vec<u8>> {
    let mut new = all(changes, bytes.get(..bytes.len().checked_sub(4)?)?);
    let checksum = crc32fast::hash(&new).to_le_bytes();
    new.extend(checksum);
    Some(new)
}
