//! Files and folders that appear whole or not at all, and bounded reading of untrusted files.
//!
//! A run that is interrupted while it writes must never leave half an archive or picture under the
//! final name: the next run would read it as a result. Every writer of the crate goes through
//! [`write_atomic`], or through an [`AtomicFile`] if the contents come piece by piece.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};
use zip::ZipArchive;
use zip::result::ZipError;

/// Writes the file `path` through a temporary file in the same folder.
///
/// Missing parent folders are created. `write` receives the open temporary file; when it returns,
/// the contents are flushed, synced to the disk and renamed to `path`, replacing an existing file.
/// A reader therefore sees the old file or the complete new one. On any error, and on a panic of
/// `write`, the temporary file is removed and `path` is left as it was.
///
/// # Errors
///
/// What `write` returns, or the error of the file system (no file name in `path`, folder not
/// writable, disk full). The error does not name `path`; callers add it.
///
/// # Examples
///
/// ```
/// use std::io::Write;
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("new/verdict.txt");
/// tinyfusion::files::write_atomic(&path, |file| writeln!(file, "pass"))?;
/// assert_eq!(std::fs::read_to_string(&path)?, "pass\n");
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn write_atomic(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> io::Result<()> {
    let mut file = AtomicFile::create(path)?;
    write(&mut file.writer)?;
    file.commit()
}

/// Creates the folder `path`, which must not exist or be empty. `write` fills a temporary folder
/// beside it, which is then renamed: the folder appears whole or not at all.
///
/// # Errors
///
/// What `write` returns; errors of the file system, converted by `io`.
pub fn write_folder<T, E>(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<T, E>,
    io: impl Fn(io::Error) -> E,
) -> Result<T, E> {
    // A link, or `.`, is resolved to the folder's real name.
    let path = match path.is_dir() {
        true => path.canonicalize().map_err(&io)?,
        false => path.to_owned(),
    };
    let temporary = create_temporary_folder(&path).map_err(&io)?;
    let written = write(&temporary)
        .and_then(|written| fs::rename(&temporary, &path).map(|()| written).map_err(io));
    if written.is_err() {
        // The temporary folder was not visible under its final name yet.
        let _ = fs::remove_dir_all(&temporary);
    }
    written
}

/// Creates `.NAME.PID-COUNT.tmp` beside a path.
fn create_temporary_folder(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "the path has no name of its own",
        )
    })?;
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    fs::create_dir_all(parent.unwrap_or(Path::new(".")))?;
    loop {
        let temporary = path.with_file_name(temporary_name(name));
        match fs::create_dir(&temporary) {
            Ok(()) => return Ok(temporary),
            // Left behind by a killed process with the same id.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// A name that no other thread or process is using.
fn temporary_name(name: &std::ffi::OsStr) -> OsString {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}-{count}.tmp", std::process::id()));
    temporary
}

/// Opens a regular file to read. Others are refused: a pipe would block, and a device may never
/// end.
///
/// # Errors
///
/// The error of the file system.
pub fn open_file(path: &Path) -> io::Result<File> {
    if fs::metadata(path)?.is_file() {
        return File::open(path);
    }
    let message = "it is no regular file";
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

/// Most bytes of a text beside weights; an index of a million tensors has less.
const MOST_TEXT: u64 = 1 << 27;

/// Reads a text from a regular file.
///
/// # Errors
///
/// The error of the file system; of a file that is too large or no text, one that says so.
pub fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open_file(path)?
        .take(MOST_TEXT + 1)
        .read_to_string(&mut text)?;
    match text.len() as u64 > MOST_TEXT {
        true => Err(io::Error::other(
            "it is larger than 128 MiB, too large for a text",
        )),
        false => Ok(text),
    }
}

/// Reads an untrusted file up to a bound, more than any sound file of its size needs.
///
/// The end of an archive is searched backwards; one with many false ends makes its parser read the
/// same bytes over and over, for minutes.
#[derive(Debug)]
pub struct Bounded {
    file: File,
    left: u64,
}

impl Bounded {
    /// A bound of eight times the file's size plus one GiB.
    ///
    /// # Errors
    ///
    /// The error of the file system.
    pub fn new(file: File) -> io::Result<Self> {
        let left = (file.metadata()?.len().saturating_mul(8)).saturating_add(1 << 30);
        Ok(Self { file, left })
    }

    /// The file, without the bound.
    pub fn into_inner(self) -> File {
        self.file
    }
}

impl Read for Bounded {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it leads in circles: it was made to be read for ever",
            ));
        }
        let read = self.file.read(out)?;
        self.left = self.left.saturating_sub(read as u64);
        Ok(read)
    }
}

impl Seek for Bounded {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Opens a zip archive and checks that its directory is complete. A directory has no checksum: a
/// damaged one may list some entries twice and others not at all, so that an optional entry would
/// be missing unnoticed.
///
/// # Errors
/// When it is no archive, or its directory doesn't match the number of entries stated at its end.
pub fn open_zip(file: File) -> Result<ZipArchive<BufReader<Bounded>>, ZipError> {
    let listed = listed_entries(&file)?;
    let archive = ZipArchive::new(BufReader::new(Bounded::new(file)?))?;
    match listed {
        Listed::Whole(count) if count == archive.len() => Ok(archive),
        Listed::Elsewhere => Ok(archive),
        Listed::Whole(_) | Listed::Damaged => {
            let problem = "its directory is damaged: entries are missing, or listed twice";
            Err(ZipError::InvalidArchive(problem.into()))
        }
    }
}

/// Result of checking the directory of an archive.
enum Listed {
    /// It consists of this many entries.
    Whole(usize),
    /// Its entries don't match the stated number.
    Damaged,
    /// Not checked: it has more entries or bytes than the end record can count, or there is no such
    /// record.
    Elsewhere,
}

/// Walks the directory that an archive's end record describes (APPNOTE.TXT, 4.3.12 and 4.3.16).
fn listed_entries(file: &File) -> io::Result<Listed> {
    const END: usize = 22;
    const ENTRY: usize = 46;
    let length = file.metadata()?.len();
    let short = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    // The record ends the file, or is followed by a comment.
    for most in [END, END + usize::from(u16::MAX)] {
        let size = length.min(most as u64);
        let mut tail = vec![0; size as usize];
        read_at(file, &mut tail, length - size)?;
        for start in (0..(tail.len() + 1).saturating_sub(END)).rev() {
            let end = &tail[start..];
            if !end.starts_with(b"PK\x05\x06") || usize::from(short(end, 20)) != end.len() - END {
                continue;
            }
            let count = short(end, 10);
            let bytes = u32::from_le_bytes([end[12], end[13], end[14], end[15]]);
            let at = length - end.len() as u64;
            // Archives beyond 4 GiB have a Zip64 record and its locator between the directory and
            // this record.
            let mut locator = [0; 4];
            if at >= 20 {
                read_at(file, &mut locator, at - 20)?;
            }
            if count == u16::MAX || bytes == u32::MAX || locator == *b"PK\x06\x07" {
                return Ok(Listed::Elsewhere);
            }
            let Some(first) = at.checked_sub(u64::from(bytes)) else {
                return Ok(Listed::Damaged);
            };
            let mut directory = vec![0; bytes as usize];
            read_at(file, &mut directory, first)?;
            let mut rest = &directory[..];
            for _ in 0..count {
                if rest.len() < ENTRY || !rest.starts_with(b"PK\x01\x02") {
                    return Ok(Listed::Damaged);
                }
                let more: usize = [28, 30, 32]
                    .map(|at| usize::from(short(rest, at)))
                    .iter()
                    .sum();
                let Some(after) = rest.get(ENTRY + more..) else {
                    return Ok(Listed::Damaged);
                };
                rest = after;
            }
            return Ok(match rest.is_empty() {
                true => Listed::Whole(usize::from(count)),
                false => Listed::Damaged,
            });
        }
    }
    Ok(Listed::Elsewhere)
}

/// SHA-256 of a file, in hexadecimal; the file is read in pieces.
///
/// # Errors
/// When it can't be read.
pub fn sha256(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    io::copy(&mut open_file(path)?, &mut hash)?;
    Ok(format!("{:x}", hash.finalize()))
}

/// Fills `out` from offset `at` of a file; any number of threads may do so at once.
///
/// # Errors
///
/// The error of the file system, also when the file ends too early.
pub fn read_at(file: &File, out: &mut [u8], at: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, out, at);
    #[cfg(windows)]
    {
        let mut done = 0;
        while done < out.len() {
            let part = &mut out[done..];
            match std::os::windows::fs::FileExt::seek_read(file, part, at + done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => done += read,
            }
        }
        Ok(())
    }
}

/// Opens a file only to lock it; its contents, or those of a link's target, are left unchanged.
///
/// # Errors
///
/// The error of the file system.
pub fn lock_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).open(path)
}

/// A file that is being written under a temporary name, until [`commit`](Self::commit) renames it.
///
/// If dropped before, it is removed, and an existing file at its path is left as it was.
#[derive(Debug)]
pub struct AtomicFile {
    // Before `temporary`: on some systems an open file can't be removed.
    writer: BufWriter<File>,
    temporary: Temporary,
    target: PathBuf,
}

impl AtomicFile {
    /// A new file that will become `path`; missing parent folders are created.
    ///
    /// # Errors
    ///
    /// The error of the file system, as for [`write_atomic`].
    pub fn create(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name")
        })?;
        // `parent` of a bare file name is the empty path, which no system call accepts.
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(folder)?;
        let (file, temporary) = create_temporary(folder, name)?;
        Ok(Self {
            writer: BufWriter::new(file),
            temporary,
            target: path.to_owned(),
        })
    }

    /// Flushes, syncs to the disk and renames, replacing an existing file.
    ///
    /// # Errors
    ///
    /// The error of the file system; then the file is removed.
    pub fn commit(self) -> io::Result<()> {
        let Self {
            mut writer,
            temporary,
            target,
        } = self;
        writer.flush()?;
        // Without the sync a power failure may keep the rename and lose the contents.
        writer.get_ref().sync_all()?;
        drop(writer);
        temporary.rename(&target)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.writer.seek(to)
    }
}

/// Opens `.NAME.PID-COUNT.tmp`, a name no other thread or process is using.
fn create_temporary(folder: &Path, name: &std::ffi::OsStr) -> io::Result<(File, Temporary)> {
    loop {
        let path = folder.join(temporary_name(name));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, Temporary { path: Some(path) })),
            // Left behind by a killed process with the same id.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Removes the temporary file unless it was renamed.
#[derive(Debug)]
struct Temporary {
    path: Option<PathBuf>,
}

impl Temporary {
    fn rename(mut self, target: &Path) -> io::Result<()> {
        if let Some(path) = &self.path {
            fs::rename(path, target)?;
        }
        self.path = None;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // The earlier error is the one to report.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn entries_that_a_directory_has_lost_are_missed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.zip");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        for name in ["aa", "bb", "cc"] {
            let options = zip::write::SimpleFileOptions::default();
            zip.start_file(name, options).unwrap();
            zip.write_all(name.as_bytes()).unwrap();
        }
        zip.finish().unwrap();
        let whole = fs::read(&path).unwrap();
        let entries = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            open_zip(File::open(&path).unwrap()).map(|zip| zip.len())
        };
        assert_eq!(entries(&whole).unwrap(), 3);
        // The first directory record twice: the last one is then beyond the count.
        let record = 46 + 2;
        let first = whole.len() - 22 - 3 * record;
        let again = whole[first..first + record].to_vec();
        let mut twice = whole.clone();
        twice.splice(first..first, again);
        assert!(entries(&twice).is_err());
        // The end record counts one entry less, in both places.
        let mut fewer = whole.clone();
        let end = whole.len() - 22;
        (fewer[end + 8], fewer[end + 10]) = (2, 2);
        let error = entries(&fewer).unwrap_err().to_string();
        assert!(error.contains("its directory is damaged"), "{error}");
        // In larger archives another record counts the entries.
        let mut large = whole.clone();
        large.splice(end..end, [&b"PK\x06\x07"[..], &[0; 16]].concat());
        fs::write(&path, &large).unwrap();
        let listed = listed_entries(&File::open(&path).unwrap()).unwrap();
        assert!(matches!(listed, Listed::Elsewhere));
        // A comment is not damage.
        let mut said = whole.clone();
        said[end + 20] = 2;
        said.extend(b"hi");
        assert_eq!(entries(&said).unwrap(), 3);
    }

    #[test]
    fn a_lock_leaves_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "all my work").unwrap();
        lock_file(&path).unwrap().try_lock().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "all my work");
        lock_file(&folder.path().join("new.lock")).unwrap();
    }

    #[test]
    fn replaces_the_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/out.txt");
        write_atomic(&path, |file| file.write_all(b"first, longer")).unwrap();
        write_atomic(&path, |file| file.write_all(b"second")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(path.parent().unwrap()), ["out.txt"]);
    }

    #[test]
    fn a_failing_writer_keeps_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.txt");
        write_atomic(&path, |file| file.write_all(b"old")).unwrap();
        let error = write_atomic(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("stopped"))
        })
        .unwrap_err();
        assert_eq!(error.to_string(), "stopped");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["out.txt"]);
    }

    #[test]
    fn an_abandoned_file_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.txt");
        let write = |text: &[u8]| {
            let mut file = AtomicFile::create(&path).unwrap();
            file.write_all(text).unwrap();
            file
        };
        write(b"old").commit().unwrap();
        drop(write(b"new"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["out.txt"]);
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("made");
        let fill = |fails: bool| {
            let write = |folder: &Path| {
                fs::write(folder.join("a"), "a")?;
                match fails {
                    true => Err(io::Error::other("stopped")),
                    false => Ok(()),
                }
            };
            write_folder(&path, write, |error| error)
        };
        assert_eq!(fill(true).unwrap_err().to_string(), "stopped");
        assert_eq!(names(place.path()), [""; 0]);
        fs::create_dir(&path).unwrap();
        fill(false).unwrap();
        // A folder that has been filled meanwhile stays.
        fs::write(path.join("b"), "b").unwrap();
        assert!(fill(false).is_err());
        assert_eq!(names(&path), ["a", "b"]);
        assert_eq!(names(place.path()), ["made"]);
    }

    #[test]
    fn a_folder_as_target_is_an_error_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        fs::create_dir(&path).unwrap();
        assert!(write_atomic(&path, |file| file.write_all(b"x")).is_err());
        assert_eq!(names(folder.path()), ["taken"]);
        assert!(write_atomic(Path::new("/"), |_| Ok(())).is_err());
    }
}
