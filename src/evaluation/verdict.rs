//! Results of an evaluation: its numbers, and the protocol under which they are comparable.

use std::fmt;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Distances, EvaluationError, Measured, MomentsFrom, Scores, Speed};
use crate::files::{sha256, write_atomic};
use crate::npz::picture_folder::PictureFolder;
use crate::report::{Table, short};

/// A file, or a folder of pictures, identified by name and content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// File name without folders.
    pub file: String,
    /// SHA-256 of the bytes, in hexadecimal. For a folder, that of what `sha256sum` prints for its
    /// pictures in the byte order of their relative names: one line each, with the SHA-256 of its
    /// bytes and its name.
    pub sha256: String,
}

impl FileDigest {
    /// Reads a file once, a piece at a time, or all pictures of a folder.
    ///
    /// # Errors
    ///
    /// When it can't be read, or when a folder has no pictures.
    pub fn of(path: &Path) -> Result<Self, EvaluationError> {
        let sha256 = if path.is_dir() {
            PictureFolder::list(path)?.sha256()?
        } else {
            sha256(path).map_err(EvaluationError::io(path))?
        };
        Ok(Self::known(path, &sha256))
    }

    /// For a file whose SHA-256 is known.
    pub fn known(path: &Path, sha256: &str) -> Self {
        let name = path.file_name().unwrap_or(path.as_os_str());
        Self {
            file: name.to_string_lossy().into_owned(),
            sha256: sha256.to_owned(),
        }
    }
}

/// The results for one set of samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdmVerdict {
    /// The model, or the archive of samples.
    pub model: String,
    /// Parameters of the model, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<usize>,
    /// Layers of the model, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    /// Multiply-accumulates of one forward pass on one image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub macs: Option<usize>,
    /// Sampling speed in images per second, excluding decoding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images_per_second: Option<Speed>,
    /// Number of samples.
    pub count: usize,
    /// The scores.
    #[serde(flatten)]
    pub scores: Scores,
}

impl AdmVerdict {
    /// The verdict on the samples of this model.
    pub fn new(model: &str, measured: &Measured, scores: Scores) -> Self {
        Self {
            model: model.to_owned(),
            parameters: None,
            depth: None,
            macs: None,
            images_per_second: None,
            count: measured.count,
            scores,
        }
    }
}

/// The conditions under which the numbers are comparable.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdmProtocol {
    /// Number of samples of each set; FID falls as it grows.
    pub samples: usize,
    /// The reference batch.
    pub reference: FileDigest,
    /// Number of reference pictures for precision and recall; none when the reference has only
    /// moments.
    pub reference_pictures: Option<usize>,
    /// Where the reference's moments come from.
    pub reference_moments: MomentsFrom,
    /// Inception's weights.
    pub inception: FileDigest,
    /// Index of the nearest neighbour that defines the radii of precision and recall.
    pub neighbours: usize,
    /// Arithmetic of the distances in precision and recall.
    #[serde(default)]
    pub distances: Distances,
    /// Pictures per split of the Inception Score.
    pub split_size: usize,
    /// Type of Inception's computation: `f32`. Everything after it is in f64.
    pub inception_compute: String,
    /// The backend that Inception ran on.
    pub backend: String,
    /// How the samples were made, if known: solver, steps, guidance, autoencoder, seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<serde_json::Value>,
}

/// An evaluation, for a JSON file and for display: [`table`](Self::table) and remarks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdmEvaluation {
    /// The conditions under which the numbers are comparable.
    pub protocol: AdmProtocol,
    /// One for each set of samples.
    pub verdicts: Vec<AdmVerdict>,
}

impl AdmEvaluation {
    /// Writes the evaluation as JSON, atomically.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::Io`] when the file can't be written.
    pub fn write(&self, path: &Path) -> Result<(), EvaluationError> {
        let write = || {
            let text = serde_json::to_string_pretty(self)?;
            write_atomic(path, |file| writeln!(file, "{text}"))
        };
        write().map_err(EvaluationError::io(path))
    }

    /// The numbers in the usual form, one row for each set of samples.
    pub fn table(&self) -> Table<10> {
        let mut table = Table::new([
            "samples",
            "depth",
            "params",
            "MACs",
            "count",
            "FID",
            "sFID",
            "IS",
            "precision",
            "recall",
        ]);
        // Rounding may leave a zero distance slightly negative.
        let distance = |value: f64| format!("{:.2}", value.max(0.0));
        let share = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.3}"));
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        for AdmVerdict {
            model,
            parameters,
            depth,
            macs,
            count,
            scores,
            ..
        } in &self.verdicts
        {
            table.row([
                model.clone(),
                or_dash(depth.map(|depth| depth.to_string())),
                or_dash(parameters.map(short)),
                or_dash(macs.map(short)),
                count.to_string(),
                distance(scores.fid),
                scores.sfid.map_or("-".into(), distance),
                format!("{:.2}", scores.inception_score),
                share(scores.precision),
                share(scores.recall),
            ]);
        }
        table
    }
}

/// The remark on the bias of a FID of `samples` samples.
pub(crate) fn bias(samples: usize) -> String {
    format!(
        "FID of {samples} samples: it is too high by an amount that falls roughly as one over their number, so compare it \
         only with FIDs of as many samples."
    )
}

impl fmt::Display for AdmEvaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = &self.protocol;
        writeln!(f, "{}", self.table())?;
        writeln!(f, "{}", bias(protocol.samples))?;
        let file = &protocol.reference.file;
        if self
            .verdicts
            .iter()
            .any(|verdict| verdict.scores.sfid.is_none())
        {
            writeln!(
                f,
                "No sFID: {file} has no statistics of spatial features (mu_s, sigma_s)."
            )?;
        }
        if protocol.reference_pictures.is_none() {
            return writeln!(
                f,
                "No precision and recall: {file} has statistics and no pictures."
            );
        }
        match protocol.distances {
            Distances::F64 => writeln!(
                f,
                "Precision and recall: distances in f64; ADM's evaluator computes them in f16 and reports some thousandths more."
            ),
            Distances::F16 => writeln!(
                f,
                "Precision and recall: distances in f16, as in ADM's evaluator, which reports some thousandths more than f64."
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation(pictures: Option<usize>, precision: Option<f64>) -> AdmEvaluation {
        let digest = |file: &str, sha256: &str| FileDigest {
            file: file.into(),
            sha256: sha256.into(),
        };
        let scores = Scores {
            fid: -1e-7,
            sfid: Some(4.256),
            inception_score: 231.5,
            precision,
            recall: precision,
        };
        AdmEvaluation {
            protocol: AdmProtocol {
                samples: 50_000,
                reference: digest("reference.npz", "12"),
                reference_pictures: pictures,
                reference_moments: MomentsFrom::Stated,
                inception: digest("inception.pth", "34"),
                neighbours: 3,
                distances: Distances::F64,
                split_size: 5000,
                inception_compute: "f32".into(),
                backend: "ndarray".into(),
                sampling: Some(serde_json::json!({ "steps": 250, "guidance": 1.5 })),
            },
            verdicts: vec![AdmVerdict {
                model: "teacher".into(),
                parameters: None,
                depth: None,
                macs: None,
                images_per_second: None,
                count: 50_000,
                scores,
            }],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.json");
        for whole in [evaluation(Some(10_000), Some(0.82)), evaluation(None, None)] {
            whole.write(&path).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(serde_json::from_str::<AdmEvaluation>(&text).unwrap(), whole);
        }
        // A missing number is written as null, not left out.
        let json: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert!(json["verdicts"][0]["precision"].is_null());
        assert_eq!(json["verdicts"][0]["sfid"], 4.256);
        assert_eq!(json["protocol"]["reference_moments"], "stated");
        assert_eq!(json["protocol"]["distances"], "f64");
        let mut without = evaluation(None, None);
        without.verdicts[0].scores.sfid = None;
        without.protocol.distances = Distances::F16;
        without.write(&path).unwrap();
        let mut json: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert!(json["verdicts"][0]["sfid"].is_null());
        assert_eq!(json["protocol"]["distances"], "f16");
        // Results from before this choice existed used `f64`.
        json["protocol"]
            .as_object_mut()
            .unwrap()
            .remove("distances");
        let before: AdmEvaluation = serde_json::from_value(json).unwrap();
        assert_eq!(before.protocol.distances, Distances::F64);
    }

    #[test]
    fn the_table_is_what_papers_print() {
        let mut whole = evaluation(Some(10_000), Some(0.82));
        let text = whole.to_string();
        let (table, foot) = text.split_once("\n\n").unwrap();
        assert_eq!(
            table,
            "samples  depth  params  MACs  count   FID  sFID      IS  precision  recall\n\
             -------  -----  ------  ----  -----  ----  ----  ------  ---------  ------\n\
             teacher  -      -       -     50000  0.00  4.26  231.50      0.820   0.820"
        );
        let lines: Vec<&str> = foot.lines().collect();
        assert_eq!(lines.len(), 2, "{foot}");
        assert!(lines[0].starts_with("FID of 50000 samples: "), "{foot}");
        assert!(lines[1].contains("distances in f64; "), "{foot}");
        whole.protocol.distances = Distances::F16;
        assert!(whole.to_string().contains("distances in f16, as in ADM's"));

        let mut alone = evaluation(None, None);
        let text = alone.to_string();
        assert!(text.contains("231.50  -          -\n"), "{text}");
        let no_pictures =
            "No precision and recall: reference.npz has statistics and no pictures.\n";
        assert!(text.ends_with(no_pictures), "{text}");
        assert!(!text.contains("No sFID"), "{text}");
        alone.verdicts[0].scores.sfid = None;
        let text = alone.to_string();
        assert!(
            text.contains("0.00  -     231.50  -          -\n"),
            "{text}"
        );
        assert!(
            text.contains("No sFID: reference.npz has no statistics"),
            "{text}"
        );
        assert!(text.ends_with(no_pictures), "{text}");
    }

    #[test]
    fn a_file_is_hashed_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        // FIPS 180-2, B.3: a million times the letter a, so that the last piece is not full.
        std::fs::write(&path, vec![b'a'; 1_000_000]).unwrap();
        let digest = FileDigest::of(&path).unwrap();
        let expected = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
        assert_eq!(
            (digest.file.as_str(), digest.sha256.as_str()),
            ("abc", expected)
        );
        // More than one piece: the hash is not that of the first piece alone.
        std::fs::write(&path, vec![b'a'; 100_001]).unwrap();
        let longer = FileDigest::of(&path).unwrap();
        std::fs::write(&path, vec![b'a'; 100_000]).unwrap();
        assert_ne!(FileDigest::of(&path).unwrap(), longer);
        assert!(FileDigest::of(folder.path()).is_err());
        assert!(FileDigest::of(&folder.path().join("missing")).is_err());
    }
}
