//! An archive's samples as individual PNG files, for viewing and for programs that read folders.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use rayon::prelude::*;

use super::SamplingError;
use crate::files::write_folder;
use crate::images::Images;
use crate::npz::SampleReader;
use crate::stop::Stop;

/// Pictures read at once.
const BLOCK: usize = 64;

/// Refuses a folder that already exists, whatever it holds.
///
/// # Errors
/// When something of that name exists.
pub fn refuse_existing(folder: &Path) -> Result<(), SamplingError> {
    match folder.symlink_metadata() {
        Ok(_) => Err(SamplingError::place(
            folder,
            "exists; nothing is overwritten, name another folder for the pictures",
        )),
        Err(_) => Ok(()),
    }
}

/// Writes picture `i` of an archive as `00000i.png` into a new folder, which appears once all are
/// written. `progress` is called with the number of pictures written and of all pictures.
///
/// # Errors
/// When the folder exists, the archive can't be read, or a picture can't be written.
pub fn write_pictures(
    archive: &Path,
    folder: &Path,
    stop: &Stop,
    progress: impl FnMut(usize, usize),
) -> Result<(), SamplingError> {
    refuse_existing(folder)?;
    let fill = |unfinished: &Path| fill(archive, unfinished, stop, progress);
    write_folder(folder, fill, |error| SamplingError::io(folder)(error))
}

fn fill(
    archive: &Path,
    folder: &Path,
    stop: &Stop,
    mut progress: impl FnMut(usize, usize),
) -> Result<(), SamplingError> {
    let mut reader = SampleReader::open(archive)?;
    let total = reader.shape()[0];
    let mut next = 0;
    while let Some(images) = reader.next_block(BLOCK)? {
        if stop.requested() {
            return Err(SamplingError::Interrupted);
        }
        // Compression and the disk take turns.
        let count = images.shape()[0];
        (0..count).into_par_iter().try_for_each(|index| {
            let path = folder.join(format!("{:06}.png", next + index));
            write(&path, &images, index).map_err(SamplingError::io(&path))
        })?;
        next += count;
        progress(next, total);
    }
    Ok(())
}

fn write(path: &PathBuf, images: &Images, index: usize) -> std::io::Result<()> {
    let [_, height, width, channels] = images.shape();
    let colour = match channels {
        1 => ExtendedColorType::L8,
        3 => ExtendedColorType::Rgb8,
        _ => {
            let problem = format!("pictures of {channels} channels are neither grey nor RGB");
            return Err(std::io::Error::other(problem));
        }
    };
    let mut file = BufWriter::new(File::create(path)?);
    PngEncoder::new(&mut file)
        .write_image(images.image(index), width as u32, height as u32, colour)
        .map_err(std::io::Error::other)?;
    file.flush()?;
    file.get_ref().sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::npz::write_samples;

    #[test]
    fn each_picture_is_a_png_and_nothing_is_overwritten() {
        let place = tempfile::tempdir().unwrap();
        let archive = place.path().join("samples.npz");
        for channels in [1, 3] {
            let pixels: Vec<u8> = (0..70 * 2 * 5 * channels).map(|i| (i * 7) as u8).collect();
            let images = Images::new(pixels, [70, 2, 5, channels]).unwrap();
            let _ = std::fs::remove_file(&archive);
            write_samples(&archive, &images, None).unwrap();
            let folder = place.path().join(format!("png-{channels}"));
            write_pictures(&archive, &folder, &Stop::default(), |_, _| ()).unwrap();
            assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 70);
            for index in [0, 63, 64, 69] {
                let read = image::open(folder.join(format!("{index:06}.png"))).unwrap();
                assert_eq!((read.width(), read.height()), (5, 2));
                assert_eq!(read.as_bytes(), images.image(index));
            }
            let error = write_pictures(&archive, &folder, &Stop::default(), |_, _| ())
                .unwrap_err()
                .to_string();
            assert!(error.contains("nothing is overwritten"), "{error}");
        }
        // A failed attempt leaves nothing behind.
        let broken = Images::new(vec![0; 8], [2, 2, 1, 2]).unwrap();
        let _ = std::fs::remove_file(&archive);
        write_samples(&archive, &broken, None).unwrap();
        assert!(
            write_pictures(
                &archive,
                &place.path().join("none"),
                &Stop::default(),
                |_, _| ()
            )
            .is_err()
        );
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 3);
    }
}
