//! JPEG by libjpeg-turbo's decoder, which Pillow uses too; this is the only unsafe code of the
//! module.
//!
//! libjpeg reports through callbacks, and expects that the one for errors does not return. Here it
//! unwinds with a [`Complaint`] to [`decode`]. libjpeg is compiled with unwind tables (feature
//! `unwinding`), its functions are declared "C-unwind", and its frames hold nothing that must be
//! dropped: its memory belongs to the decoder, which [`Decoder`] destroys. `resume_unwind` runs no
//! panic hook, so nothing is printed and no panic is counted.

use std::any::Any;
use std::ffi::{CStr, c_char, c_int, c_long};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use image::RgbImage;
use mozjpeg_sys as sys;

/// Why a JPEG can't be decoded.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It states more pixels than allowed: width and height.
    Large(u32, u32),
    /// Message of libjpeg.
    Decoder(String),
}

/// The message of libjpeg's error; the payload of the unwinding.
struct Complaint(String);

/// Most bytes given to libjpeg at once. From 512 bytes for each block of an MCU (which has at least
/// one), it would decode a baseline MCU by its fast path, which silently reads an invalid Huffman
/// code as zero.
const PIECE: usize = 511;

/// Most bytes of a message, including its terminating zero (`JMSG_LENGTH_MAX`).
const MESSAGE: usize = 200;

/// Decodes `bytes`, one JPEG, to RGB as Pillow's `convert("RGB")` does: grey is replicated, and
/// four channels are read as inverted CMYK, as Adobe's programs write it, whether marked so or not.
pub(super) fn decode(bytes: &[u8], most_pixels: u64) -> Result<RgbImage, Failure> {
    let decoded = catch_unwind(AssertUnwindSafe(|| run(bytes, most_pixels)));
    decoded.unwrap_or_else(|payload: Box<dyn Any + Send>| {
        match payload.downcast::<Complaint>() {
            Ok(complaint) => Err(Failure::Decoder(complaint.0)),
            // A panic of this program is not an error of libjpeg.
            Err(panic) => resume_unwind(panic),
        }
    })
}

/// `[width, height]` of a JPEG; its beginning is enough.
pub(super) fn size(bytes: &[u8]) -> Result<[u32; 2], Failure> {
    match decode(bytes, 0) {
        // A limit of no pixels makes every picture too large.
        Err(Failure::Large(width, height)) => Ok([width, height]),
        Err(failure) => Err(failure),
        Ok(image) => Ok(image.dimensions().into()),
    }
}

/// The bytes libjpeg has not read yet. `manager` comes first, so that a pointer to it points to the
/// whole.
#[repr(C)]
struct Source {
    manager: sys::jpeg_source_mgr,
    rest: *const u8,
    left: usize,
}

/// Frees libjpeg's memory, also on unwinding.
struct Decoder(*mut sys::jpeg_decompress_struct);

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: `run` made the struct of zeros, which `jpeg_destroy` accepts as holding nothing,
        // and it outlives this guard. Freeing reports no errors, so nothing unwinds.
        unsafe { sys::jpeg_destroy_decompress(&mut *self.0) }
    }
}

/// Most scans of a picture. A progressive file has some ten; each goes over the whole picture, for
/// as little as a hundred bytes.
const MOST_SCANS: usize = 500;

fn run(bytes: &[u8], most_pixels: u64) -> Result<RgbImage, Failure> {
    // The marker that begins a scan does not occur within one.
    let scans = bytes
        .windows(2)
        .filter(|pair| *pair == [0xff, 0xda])
        .count();
    if scans > MOST_SCANS {
        let message = format!("{scans} scans, more than {MOST_SCANS}");
        return Err(Failure::Decoder(message));
    }
    let mut errors = MaybeUninit::<sys::jpeg_error_mgr>::zeroed();
    let errors = errors.as_mut_ptr();
    let mut source = Source {
        manager: sys::jpeg_source_mgr {
            next_input_byte: bytes.as_ptr(),
            bytes_in_buffer: 0,
            init_source: Some(nothing),
            fill_input_buffer: Some(fill),
            skip_input_data: Some(skip),
            resync_to_restart: Some(sys::jpeg_resync_to_restart),
            term_source: Some(nothing),
        },
        rest: bytes.as_ptr(),
        left: bytes.len(),
    };
    let source = &raw mut source;
    let mut info = MaybeUninit::<sys::jpeg_decompress_struct>::zeroed();
    let info = info.as_mut_ptr();

    // SAFETY: zeros are a valid value of both structs: numbers, nullable pointers, optional
    // functions, and enumerations that have a member 0. All three structs live until the end of
    // this function, longer than `decoder`, and are used through these pointers only.
    let decoder = unsafe {
        sys::jpeg_std_error(&mut *errors);
        (*errors).error_exit = Some(stop);
        (*errors).emit_message = Some(listen);
        (*info).common.err = errors;
        let decoder = Decoder(info);
        // It compares the version and struct size it was compiled with to these arguments.
        sys::jpeg_create_decompress(info);
        (*info).src = source.cast();
        decoder
    };
    // SAFETY: the functions are called in the order libjpeg prescribes, with the struct it created.
    let (width, height, channels) = unsafe {
        sys::jpeg_read_header(&mut *info, 1);
        (
            (*info).image_width,
            (*info).image_height,
            (*info).num_components,
        )
    };
    if u64::from(width) * u64::from(height) > most_pixels {
        return Err(Failure::Large(width, height));
    }
    let inverted = match channels {
        1 | 3 => false,
        4 => true,
        other => {
            let message = format!("{other} channels, which no colours are known for");
            return Err(Failure::Decoder(message));
        }
    };
    // SAFETY: as above; libjpeg converts to either colour space, or reports an error.
    unsafe {
        (*info).out_color_space = if inverted {
            sys::J_COLOR_SPACE::JCS_CMYK
        } else {
            sys::J_COLOR_SPACE::JCS_RGB
        };
        sys::jpeg_start_decompress(&mut *info);
    }
    let mut pixels = vec![0; width as usize * height as usize * 3];
    let mut inks = vec![0; if inverted { width as usize * 4 } else { 0 }];
    for row in pixels.chunks_exact_mut(width as usize * 3) {
        let mut start = if inverted {
            inks.as_mut_ptr()
        } else {
            row.as_mut_ptr()
        };
        // SAFETY: `start` points to `width` pixels of the colour space set above, and nothing else
        // uses them meanwhile. libjpeg writes one row: the source never suspends it.
        unsafe { sys::jpeg_read_scanlines(&mut *info, &raw mut start, 1) };
        if inverted {
            from_inverted_cmyk(&inks, row);
        }
    }
    // SAFETY: all rows were read, as required. It reads on to the end marker.
    unsafe { sys::jpeg_finish_decompress(&mut *info) };
    drop(decoder);
    Ok(RgbImage::from_raw(width, height, pixels).expect("three bytes were made of every pixel"))
}

/// Pillow's conversion of CMYK, in its integer arithmetic; `inks` are inverted, so 255 is no ink.
fn from_inverted_cmyk(inks: &[u8], row: &mut [u8]) {
    let (inks, _) = inks.as_chunks::<4>();
    let (pixels, _) = row.as_chunks_mut::<3>();
    for (pixel, &[c, m, y, k]) in pixels.iter_mut().zip(inks) {
        *pixel = [c, m, y].map(|ink| {
            // The ink absorbs its share of the light that black leaves: `k` less the rounded
            // product over 255.
            let light = u32::from(k);
            let product = u32::from(255 - ink) * light + 128;
            (light - ((product >> 8) + product) / 256) as u8
        });
    }
}

/// Error callback: leaves libjpeg by unwinding with its message.
unsafe extern "C-unwind" fn stop(common: &mut sys::jpeg_common_struct) {
    /// As C declares it. The buffer in the bindings' type is too short and not mutable.
    type Format = unsafe extern "C-unwind" fn(*mut sys::jpeg_common_struct, *mut c_char);
    let mut message: [c_char; MESSAGE] = [0; MESSAGE];
    // SAFETY: libjpeg passes its own struct, whose errors `run` set up and which outlives the call.
    // The two function types differ in the kinds of pointers only. The function writes a string of
    // at most `MESSAGE` bytes.
    let message = unsafe {
        if let Some(format) = (*common.err).format_message {
            let format: Format = std::mem::transmute(format);
            format(common, message.as_mut_ptr());
        }
        CStr::from_ptr(message.as_ptr())
    };
    resume_unwind(Box::new(Complaint(message.to_string_lossy().into_owned())))
}

/// Message callback; `level` is negative for a warning. By default libjpeg prints the warning and
/// goes on, with grey or repeated pixels in place of missing ones.
///
/// The ignored warnings leave the pixels as the encoder meant them, and old but sound photographs
/// cause them: stray bytes before a marker, an unknown version of JFIF, an unknown transform in
/// Adobe's marker (read as YCbCr or YCCK), and a range of coefficients in a baseline file, where
/// none is needed. All others say that compressed data are missing or wrong: a segment ends early,
/// a code is invalid (Huffman or arithmetic), a restart marker is out of order, a progressive scan
/// refines what no scan has sent, or the file ends without its marker.
unsafe extern "C-unwind" fn listen(common: &mut sys::jpeg_common_struct, level: c_int) {
    const HARMLESS: [c_int; 4] = [
        sys::JWRN_EXTRANEOUS_DATA,
        sys::JWRN_JFIF_MAJOR,
        sys::JWRN_ADOBE_XFORM,
        sys::JWRN_NOT_SEQUENTIAL,
    ];
    // SAFETY: libjpeg passes its own struct, whose errors `run` set up.
    unsafe {
        if level < 0 && !HARMLESS.contains(&(*common.err).msg_code) {
            stop(common);
        }
    }
}

/// Callback before the first byte and after the last: nothing to do.
unsafe extern "C-unwind" fn nothing(_: &mut sys::jpeg_decompress_struct) {}

/// Supplies the next piece. It never suspends libjpeg.
unsafe extern "C-unwind" fn fill(info: &mut sys::jpeg_decompress_struct) -> sys::boolean {
    // SAFETY: `src` is the `Source` of `run`, which outlives the decoder; `rest` and `left` are the
    // remaining bytes.
    unsafe {
        let source = info.src.cast::<Source>();
        let count = (*source).left.min(PIECE);
        if count == 0 {
            (*info.common.err).msg_code = sys::JWRN_JPEG_EOF;
            stop(&mut info.common);
        }
        (*source).manager.next_input_byte = (*source).rest;
        (*source).manager.bytes_in_buffer = count;
        (*source).rest = (*source).rest.add(count);
        (*source).left -= count;
    }
    1
}

/// Skips `count` bytes, or all that are left.
unsafe extern "C-unwind" fn skip(info: &mut sys::jpeg_decompress_struct, count: c_long) {
    // SAFETY: as in `fill`.
    unsafe {
        let source = info.src.cast::<Source>();
        let count = usize::try_from(count).unwrap_or(0);
        let here = count.min((*source).manager.bytes_in_buffer);
        (*source).manager.next_input_byte = (*source).manager.next_input_byte.add(here);
        (*source).manager.bytes_in_buffer -= here;
        let later = (count - here).min((*source).left);
        (*source).rest = (*source).rest.add(later);
        (*source).left -= later;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::path::{Path, PathBuf};

    use super::*;

    const ALL: u64 = u64::MAX;

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/jpeg")
    }

    fn fixture(name: &str) -> Vec<u8> {
        std::fs::read(fixtures().join(name)).unwrap()
    }

    /// libjpeg's message for a damaged file.
    fn complaint(bytes: &[u8]) -> String {
        match decode(bytes, ALL) {
            Err(Failure::Decoder(message)) => message,
            other => panic!("expected a complaint, found {other:?}"),
        }
    }

    /// Positions of the scans' markers.
    fn scans(bytes: &[u8]) -> Vec<usize> {
        let pairs = bytes.windows(2).enumerate();
        pairs
            .filter(|(_, pair)| *pair == [0xff, 0xda])
            .map(|(at, _)| at)
            .collect()
    }

    /// Noise of 128 x 128 pixels: far more bytes than the fast path needs for an MCU.
    fn noise() -> Vec<u8> {
        let mut state = 1u32;
        let pixels: Vec<u8> = (0..128 * 128 * 3)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        let mut bytes = Vec::new();
        jpeg_encoder::Encoder::new(&mut bytes, 90)
            .encode(&pixels, 128, 128, jpeg_encoder::ColorType::Rgb)
            .unwrap();
        bytes
    }

    #[test]
    fn pictures_equal_pillows_to_the_last_bit() {
        let mut count = 0;
        for entry in std::fs::read_dir(fixtures()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().unwrap() == "jpg" {
                let found = decode(&std::fs::read(&path).unwrap(), ALL).unwrap();
                let expected = image::open(path.with_extension("png")).unwrap();
                assert!(found == expected.into_rgb8(), "{}", path.display());
                count += 1;
            }
        }
        assert_eq!(count, 14);
    }

    #[test]
    fn missing_data_are_an_error() {
        const END: [u8; 2] = [0xff, 0xd9];
        for name in [
            "baseline_420.jpg",
            "progressive_420.jpg",
            "arithmetic_420.jpg",
        ] {
            let whole = fixture(name);
            let cut = &whole[..whole.len() - 20];
            let message = complaint(cut);
            assert!(message.contains("Premature end of JPEG file"), "{message}");
            // The picture is complete, but the end marker is missing; Pillow refuses it too.
            let message = complaint(&whole[..whole.len() - 2]);
            assert!(message.contains("Premature end of JPEG file"), "{message}");
        }
        for name in ["baseline_420.jpg", "progressive_420.jpg"] {
            let whole = fixture(name);
            let message = complaint(&[&whole[..whole.len() - 20], &END].concat());
            assert!(
                message.contains("premature end of data segment"),
                "{message}"
            );
        }
    }

    #[test]
    fn invalid_codes_are_an_error_everywhere_in_a_scan() {
        // Sixteen ones are no Huffman code; every byte of ones is followed by a zero.
        let whole = noise();
        for share in [4, 2] {
            let mut damaged = whole.clone();
            let at = whole.len() / share;
            damaged[at..at + 12].copy_from_slice(&[0xff, 0].repeat(6));
            let message = complaint(&damaged);
            assert!(message.contains("bad Huffman code"), "{message}");
        }
    }

    #[test]
    fn wrong_arithmetic_codes_are_an_error() {
        let whole = fixture("arithmetic_420.jpg");
        let start = scans(&whole)[0] + 14;
        let messages: Vec<String> = (start..whole.len() - 2)
            .filter_map(|at| {
                let mut damaged = whole.clone();
                damaged[at] ^= 0x55;
                decode(&damaged, ALL).err()
            })
            .map(|failure| format!("{failure:?}"))
            .collect();
        assert!(
            messages.iter().any(|m| m.contains("bad arithmetic code")),
            "{messages:?}"
        );
    }

    #[test]
    fn a_lost_restart_marker_is_an_error() {
        let mut bytes = fixture("restart_420.jpg");
        let marker = bytes.windows(2).position(|pair| pair == [0xff, 0xd0]);
        bytes[marker.unwrap() + 1] = 0xd3;
        let message = complaint(&bytes);
        assert!(
            message.contains("found marker 0xd3 instead of RST0"),
            "{message}"
        );
    }

    #[test]
    fn a_lost_scan_that_others_refine_is_an_error() {
        let mut bytes = fixture("progressive_420.jpg");
        let first = scans(&bytes)[0];
        let length = bytes[first + 2..]
            .windows(2)
            .position(|pair| pair[0] == 0xff && pair[1] != 0)
            .unwrap();
        bytes.drain(first..first + 2 + length);
        let message = complaint(&bytes);
        assert!(
            message.contains("Inconsistent progression sequence"),
            "{message}"
        );
    }

    #[test]
    fn harmless_oddities_are_none() {
        let whole = fixture("baseline_420.jpg");
        let expected = decode(&whole, ALL).unwrap();
        let end = whole.len() - 2;
        let mut variants = vec![[&whole[..end], &[0, 0, 0x12], &whole[end..]].concat()];
        let before_scan = scans(&whole)[0];
        variants.push([&whole[..before_scan], &[1, 2], &whole[before_scan..]].concat());
        let changed = |at: usize, from: u8, to: u8| {
            let mut bytes = whole.clone();
            assert_eq!(bytes[at], from);
            bytes[at] = to;
            bytes
        };
        // The major version of JFIF, and the last coefficient of the scan.
        variants.push(changed(11, 1, 3));
        variants.push(changed(before_scan + 12, 63, 0));
        variants.push([&whole[..], b"after the end"].concat());
        for (index, variant) in variants.iter().enumerate() {
            assert_eq!(decode(variant, ALL), Ok(expected.clone()), "{index}");
        }
        let mut adobe = fixture("ycck_adobe.jpg");
        let name = adobe.windows(5).position(|name| name == b"Adobe").unwrap();
        assert_eq!(adobe[name + 11], 2);
        adobe[name + 11] = 7;
        assert_eq!(decode(&adobe, ALL), decode(&fixture("ycck_adobe.jpg"), ALL));
    }

    #[test]
    fn errors_of_the_structure_are_errors() {
        let whole = fixture("grey.jpg");
        let frame = whole.windows(2).position(|pair| pair == [0xff, 0xc0]);
        let changed = |offset: usize, to: u8| {
            let mut bytes = whole.clone();
            bytes[frame.unwrap() + offset] = to;
            bytes
        };
        let cases = [
            (b"\xff\xd8\xff".to_vec(), "Premature end of JPEG file"),
            (b"\xff\xd8\xff\xd9".to_vec(), "contains no image"),
            (vec![0; 9], "starts with 0x00 0x00"),
            (changed(1, 0xc3), "SOF type 0xc3"),
            (changed(4, 12), "precision 12"),
            // The low byte of the height, whose high byte is 0.
            (changed(6, 0), "Empty JPEG image"),
        ];
        for (bytes, expected) in cases {
            let message = complaint(&bytes);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn the_size_is_refused_before_the_pixels_are_made() {
        let bytes = fixture("baseline_420.jpg");
        assert_eq!(decode(&bytes, 24 * 17 - 1), Err(Failure::Large(24, 17)));
        assert!(decode(&bytes, 24 * 17).is_ok());
    }

    #[test]
    fn scans_without_end_are_refused() {
        let whole = fixture("progressive_420.jpg");
        let scan = (0..whole.len() - 1).rfind(|at| whole[*at..*at + 2] == [0xff, 0xda]);
        let (before, end) = whole.split_at(whole.len() - 2);
        let last = before[scan.unwrap()..].repeat(MOST_SCANS);
        let message = complaint(&[before, &last, end].concat());
        assert!(message.contains("scans, more than 500"), "{message}");
    }

    #[test]
    fn a_complaint_is_no_panic() {
        thread_local! {
            static PANICS: Cell<usize> = const { Cell::new(0) };
        }
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.with(|count| count.set(count.get() + 1));
            others(panic);
        }));
        let whole = fixture("progressive_420.jpg");
        for length in 0..whole.len() {
            assert!(decode(&whole[..length], ALL).is_err());
        }
        assert_eq!(PANICS.with(Cell::get), 0);
    }
}
