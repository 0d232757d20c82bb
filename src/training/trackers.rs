//! The log of a training in forms that other programs follow: TensorBoard's event files, and CSV.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::TrainingError;

/// A form of the log beside `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tracker {
    /// An event file, `events.out.tfevents.*`.
    Tensorboard,
    /// `metrics.csv`.
    Csv,
}

impl Tracker {
    /// All, by their names.
    pub const NAMES: [(&'static str, Self); 2] =
        [("tensorboard", Self::Tensorboard), ("csv", Self::Csv)];
}

/// Keys of a line that are no curve.
const NO_CURVE: [&str; 2] = ["step", "time"];

/// Logs that are being written.
#[derive(Debug)]
pub(super) struct Trackers {
    events: Option<(PathBuf, File)>,
    csv: Option<(PathBuf, File)>,
    /// Columns of the CSV, once the first line is known.
    columns: Vec<String>,
}

impl Trackers {
    /// Opens the logs in a folder, and begins them with the lines that `metrics.jsonl`, at `log`,
    /// has already: those of a run that goes on.
    ///
    /// # Errors
    /// When a file can't be read or written.
    pub(super) fn open(
        folder: &Path,
        trackers: &[Tracker],
        log: &Path,
    ) -> Result<Self, TrainingError> {
        let create = |path: PathBuf| -> Result<(PathBuf, File), TrainingError> {
            let mut options = OpenOptions::new();
            let file = options.create(true).write(true).truncate(true).open(&path);
            let file = file.map_err(TrainingError::io(&path))?;
            Ok((path, file))
        };
        let wants = |tracker: Tracker| trackers.contains(&tracker);
        let events = match wants(Tracker::Tensorboard) {
            true => {
                // One file holds the whole training: steps that were done again are in it once.
                remove_events(folder).map_err(TrainingError::io(folder))?;
                let second = super::strategy::unix_time() as u64;
                let name = format!("events.out.tfevents.{second}.tinyfusion");
                let (path, mut file) = create(folder.join(name))?;
                let version = event(super::strategy::unix_time(), None, |out| {
                    bytes_field(out, 3, b"brain.Event:2");
                });
                file.write_all(&record(&version))
                    .map_err(TrainingError::io(&path))?;
                Some((path, file))
            }
            false => None,
        };
        let csv = wants(Tracker::Csv)
            .then(|| create(folder.join("metrics.csv")))
            .transpose()?;
        let mut opened = Self {
            events,
            csv,
            columns: Vec::new(),
        };
        if trackers.is_empty() {
            return Ok(opened);
        }
        let earlier = std::fs::read_to_string(log).map_err(TrainingError::io(log))?;
        for line in earlier.lines() {
            if let Ok(line) = serde_json::from_str::<Map<String, Value>>(line) {
                opened.write(&line)?;
            }
        }
        Ok(opened)
    }

    /// Appends a line of the log.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn write(&mut self, line: &Map<String, Value>) -> Result<(), TrainingError> {
        if let Some((path, file)) = &mut self.events {
            let time = line.get("time").and_then(Value::as_f64).unwrap_or(0.0);
            let step = line.get("step").and_then(Value::as_u64).unwrap_or(0);
            let curves = line
                .iter()
                .filter(|(key, _)| !NO_CURVE.contains(&key.as_str()));
            let curves = curves.filter_map(|(key, value)| Some((key, value.as_f64()?)));
            let event = event(time, Some(step), |out| {
                let mut summary = Vec::new();
                for (key, value) in curves {
                    let mut scalar = Vec::new();
                    bytes_field(&mut scalar, 1, key.as_bytes());
                    tag(&mut scalar, 2, FIXED_32);
                    scalar.extend((value as f32).to_le_bytes());
                    bytes_field(&mut summary, 1, &scalar);
                }
                bytes_field(out, 5, &summary);
            });
            file.write_all(&record(&event))
                .map_err(TrainingError::io(path))?;
        }
        if let Some((path, file)) = &mut self.csv {
            let mut text = String::new();
            if self.columns.is_empty() {
                self.columns = line.keys().cloned().collect();
                text = self.columns.join(",") + "\n";
            }
            let cell = |key: &String| match line.get(key) {
                None | Some(Value::Null) => String::new(),
                Some(value) => value.to_string(),
            };
            let cells: Vec<String> = self.columns.iter().map(cell).collect();
            text += &(cells.join(",") + "\n");
            file.write_all(text.as_bytes())
                .map_err(TrainingError::io(path))?;
        }
        Ok(())
    }
}

fn remove_events(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy());
        if name.is_some_and(|name| name.starts_with("events.out.tfevents.")) {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}

// Protocol buffers' wire types.
const VARINT: u64 = 0;
const FIXED_64: u64 = 1;
const BYTES: u64 = 2;
const FIXED_32: u64 = 5;

/// An `Event` of TensorBoard (tensorflow/core/util/event.proto): time, step, and what `rest` adds.
fn event(time: f64, step: Option<u64>, rest: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    tag(&mut out, 1, FIXED_64);
    out.extend(time.to_le_bytes());
    if let Some(step) = step {
        tag(&mut out, 2, VARINT);
        varint(&mut out, step);
    }
    rest(&mut out);
    out
}

fn tag(out: &mut Vec<u8>, field: u64, kind: u64) {
    varint(out, field << 3 | kind);
}

fn bytes_field(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    tag(out, field, BYTES);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A record of a TFRecord file: length, its checksum, the data, their checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked(crc32c(&length)).to_le_bytes());
    out.extend(data);
    out.extend(masked(crc32c(data)).to_le_bytes());
    out
}

/// A checksum of data that may hold checksums themselves, as TFRecord masks it.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: a line of a log has some hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            let lowest = 0u32.wrapping_sub(crc & 1);
            crc >> 1 ^ (0x82f6_3b78 & lowest)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step with its curves.
    type Event = (Option<u64>, Vec<(String, f32)>);

    /// The events of a file.
    fn read(bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let said = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            assert_eq!(said(8), masked(crc32c(&rest[..8])));
            let data = &rest[12..12 + length];
            assert_eq!(said(12 + length), masked(crc32c(data)));
            let mut event = (None, Vec::new());
            for (field, value) in fields(data) {
                match (field, value) {
                    (2, Field::Number(step)) => event.0 = Some(step),
                    (5, Field::Bytes(summary)) => {
                        for (_, scalar) in fields(summary) {
                            let Field::Bytes(scalar) = scalar else {
                                panic!()
                            };
                            let parts = fields(scalar);
                            let (Field::Bytes(key), Field::Number(bits)) = (parts[0].1, parts[1].1)
                            else {
                                panic!()
                            };
                            let key = String::from_utf8(key.to_vec()).unwrap();
                            event.1.push((key, f32::from_bits(bits as u32)));
                        }
                    }
                    _ => {}
                }
            }
            events.push(event);
            rest = &rest[16 + length..];
        }
        events
    }

    #[derive(Clone, Copy)]
    enum Field<'a> {
        Number(u64),
        Bytes(&'a [u8]),
    }

    fn fields(mut data: &[u8]) -> Vec<(u64, Field<'_>)> {
        let number = |data: &mut &[u8]| {
            let (mut value, mut shift) = (0, 0);
            loop {
                let byte = data[0];
                *data = &data[1..];
                value |= u64::from(byte & 0x7f) << shift;
                shift += 7;
                if byte < 0x80 {
                    return value;
                }
            }
        };
        let mut found = Vec::new();
        while !data.is_empty() {
            let tag = number(&mut data);
            let width = |data: &mut &[u8], count: usize| {
                let mut bytes = [0; 8];
                bytes[..count].copy_from_slice(&data[..count]);
                *data = &data[count..];
                Field::Number(u64::from_le_bytes(bytes))
            };
            let value = match tag & 7 {
                VARINT => Field::Number(number(&mut data)),
                FIXED_64 => width(&mut data, 8),
                FIXED_32 => width(&mut data, 4),
                _ => {
                    let length = number(&mut data) as usize;
                    let (bytes, after) = data.split_at(length);
                    data = after;
                    Field::Bytes(bytes)
                }
            };
            found.push((tag >> 3, value));
        }
        found
    }

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn what_is_written_is_read_back_and_a_run_that_goes_on_has_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let line = |step: u64, loss: f64| -> Map<String, Value> {
            let line = serde_json::json!({ "step": step, "time": 1.5, "loss": loss, "lr": 300 });
            line.as_object().unwrap().clone()
        };
        let all = Tracker::NAMES.map(|(_, tracker)| tracker);
        let log = folder.path().join("metrics.jsonl");
        std::fs::write(&log, "").unwrap();
        let mut trackers = Trackers::open(folder.path(), &all, &log).unwrap();
        trackers.write(&line(0, 0.5)).unwrap();
        trackers.write(&line(300, 0.25)).unwrap();
        drop(trackers);
        let earlier = serde_json::to_string(&line(0, 0.5)).unwrap() + "\n{\"half";
        std::fs::write(&log, earlier).unwrap();
        let mut trackers = Trackers::open(folder.path(), &all, &log).unwrap();
        trackers.write(&line(200, 0.125)).unwrap();

        let files = std::fs::read_dir(folder.path()).unwrap().flatten();
        let events: Vec<PathBuf> = files
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|end| end == "tinyfusion"))
            .collect();
        assert_eq!(events.len(), 1);
        let found = read(&std::fs::read(&events[0]).unwrap());
        assert_eq!(found[0], (None, Vec::new()));
        let curves = |loss: f32| vec![("loss".to_owned(), loss), ("lr".to_owned(), 300.0)];
        assert_eq!(
            found[1..],
            [(Some(0), curves(0.5)), (Some(200), curves(0.125))]
        );
        let csv = std::fs::read_to_string(folder.path().join("metrics.csv")).unwrap();
        assert_eq!(csv, "loss,lr,step,time\n0.5,300,0,1.5\n0.125,300,200,1.5\n");
    }
}
