//! `.npy` files (NumPy Enhancement Proposal 1): the header that is written.

/// The header of a `.npy` file, version 1.0: magic, length, and a Python dictionary padded with
/// spaces so that the data begins at a multiple of 64 bytes.
pub(crate) fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let sides: String = shape.iter().map(|side| format!("{side}, ")).collect();
    let mut text = format!(
        "{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}",
        sides.trim_end()
    );
    let prefix = b"\x93NUMPY\x01\x00";
    let unpadded = prefix.len() + 2 + text.len() + 1;
    text.push_str(&" ".repeat(unpadded.next_multiple_of(64) - unpadded));
    text.push('\n');
    // At most four sides of at most 20 digits each: far below 65536.
    let length = (text.len() as u16).to_le_bytes();
    [&prefix[..], &length, text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_numpys() {
        let header = header("|u1", &[5, 8, 6, 3]);
        assert_eq!(header.len(), 128);
        assert_eq!(header[8..10], [118, 0]);
        let text = str::from_utf8(&header[10..]).unwrap();
        assert!(
            text.starts_with("{'descr': '|u1', 'fortran_order': False, 'shape': (5, 8, 6, 3,), }")
        );
        assert!(text.ends_with(" \n"));
    }
}
