//! Headers of `.npy` files (NumPy Enhancement Proposal 1): magic, version, length, and a Python
//! dictionary.

use std::io::Read;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longest dictionary. NumPy's own take 118 bytes; the longest for the types and shapes read here,
/// a few hundred.
const MOST: usize = 4096;
/// Most dimensions of an array, NumPy's own limit.
const MOST_SIDES: usize = 64;

/// The header of a `.npy` file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// The type, such as `<f4`.
    pub(crate) descr: String,
    /// Whether the first index varies fastest.
    pub(crate) fortran: bool,
    /// Number of elements along each axis.
    pub(crate) shape: Vec<usize>,
}

impl Header {
    /// Reads a header and stops at the first value.
    ///
    /// # Errors
    /// Why it is no header of an array of numbers.
    pub(crate) fn read(file: &mut impl Read) -> Result<Self, String> {
        let io = |error: std::io::Error| error.to_string();
        let mut start = [0; 8];
        file.read_exact(&mut start).map_err(io)?;
        if !start.starts_with(MAGIC) {
            let found = start[..MAGIC.len()].escape_ascii();
            return Err(format!("a file that begins with \"{found}\""));
        }
        let mut length = [0; 4];
        let bytes = match start[6] {
            1 => 2,
            2 | 3 => 4,
            version => return Err(format!("version {version}")),
        };
        file.read_exact(&mut length[..bytes]).map_err(io)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MOST {
            return Err(format!(
                "a header of {length} bytes, where {MOST} are plenty"
            ));
        }
        let mut text = vec![0; length];
        file.read_exact(&mut text).map_err(io)?;
        let mut reader = Reader { text: &text, at: 0 };
        reader
            .header()
            .ok_or_else(|| format!("\"{}\"", text.trim_ascii().escape_ascii()))
            .map_err(|found| match found.char_indices().nth(200) {
                Some((end, _)) => format!("the header {}…", &found[..end]),
                None => format!("the header {found}"),
            })
    }

    /// Bytes of an element; None for a type without a fixed size.
    pub(crate) fn item_bytes(&self) -> Option<usize> {
        let mut letters = self.descr.bytes();
        let (_, kind) = (letters.next()?, letters.next()?);
        let digits = self.descr.get(2..)?;
        let end = digits.find(|c: char| !c.is_ascii_digit());
        let count: usize = digits[..end.unwrap_or(digits.len())].parse().ok()?;
        // Text is counted in characters, of four bytes each.
        count.checked_mul(if kind == b'U' { 4 } else { 1 })
    }

    /// Number of elements; None if it overflows.
    pub(crate) fn elements(&self) -> Option<usize> {
        let sides = self.shape.iter();
        sides.copied().try_fold(1usize, usize::checked_mul)
    }
}

/// Parser of a header's Python literal. Only what NumPy writes for an array of one type is
/// accepted; it has no nesting, so no input can nest deeply.
struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    /// `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }`, with the keys in any order,
    /// each once.
    fn header(&mut self) -> Option<Header> {
        let (mut descr, mut fortran, mut shape) = (None, None, None);
        self.token(b"{")?;
        loop {
            if self.token(b"}").is_some() {
                break;
            }
            let key = self.string()?;
            self.token(b":")?;
            match key.as_str() {
                "descr" if descr.is_none() => descr = Some(self.string()?),
                "fortran_order" if fortran.is_none() => fortran = Some(self.boolean()?),
                "shape" if shape.is_none() => shape = Some(self.tuple()?),
                _ => return None,
            }
            if self.token(b",").is_none() {
                self.token(b"}")?;
                break;
            }
        }
        self.blanks();
        (self.at == self.text.len()).then_some(())?;
        Some(Header {
            descr: descr?,
            fortran: fortran?,
            shape: shape?,
        })
    }

    fn blanks(&mut self) {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_ascii_start().len();
    }

    /// Skips blanks, then these bytes if they are next.
    fn token(&mut self, token: &[u8]) -> Option<()> {
        self.blanks();
        self.text[self.at..]
            .starts_with(token)
            .then(|| self.at += token.len())
    }

    /// A string without escapes.
    fn string(&mut self) -> Option<String> {
        let quote = match self.token(b"'") {
            Some(()) => b'\'',
            None => self.token(b"\"").map(|()| b'"')?,
        };
        let rest = &self.text[self.at..];
        let length = rest
            .iter()
            .position(|byte| *byte == quote || *byte == b'\\')?;
        (rest[length] == quote).then_some(())?;
        self.at += length + 1;
        String::from_utf8(rest[..length].to_vec()).ok()
    }

    fn boolean(&mut self) -> Option<bool> {
        match self.token(b"True") {
            Some(()) => Some(true),
            None => self.token(b"False").map(|()| false),
        }
    }

    fn tuple(&mut self) -> Option<Vec<usize>> {
        let mut sides = Vec::new();
        self.token(b"(")?;
        loop {
            if self.token(b")").is_some() {
                return Some(sides);
            }
            self.blanks();
            let rest = &self.text[self.at..];
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let number = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
            self.at += digits;
            // Python 2 wrote long integers with an `L`.
            let _ = self.text[self.at..].starts_with(b"L").then(|| self.at += 1);
            (sides.len() < MOST_SIDES).then(|| sides.push(number))?;
            if self.token(b",").is_none() {
                self.token(b")")?;
                return Some(sides);
            }
        }
    }
}

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
    // At most four dimensions of at most 20 digits each: far below 65536.
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

    fn file(version: u8, text: &str) -> Vec<u8> {
        let length = (text.len() as u32).to_le_bytes();
        let length = &length[..if version == 1 { 2 } else { 4 }];
        [
            b"\x93NUMPY",
            &[version, 0][..],
            length,
            text.as_bytes(),
            b"data",
        ]
        .concat()
    }

    #[test]
    fn headers_as_programs_write_them_are_read() {
        for (text, fortran, shape) in [
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }   \n",
                false,
                &[2, 3][..],
            ),
            (
                "{\"shape\":(7,),\"fortran_order\":True,\"descr\":\"<f4\"}",
                true,
                &[7],
            ),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (5L, 1L), }\n",
                false,
                &[5, 1],
            ),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
                false,
                &[],
            ),
        ] {
            for version in [1, 2, 3] {
                let file = file(version, text);
                let mut rest = &file[..];
                let header = Header::read(&mut rest).unwrap();
                assert_eq!(
                    (header.fortran, &header.shape[..]),
                    (fortran, shape),
                    "{text}"
                );
                assert_eq!((header.descr.as_str(), rest), ("<f4", &b"data"[..]));
                assert_eq!(header.item_bytes(), Some(4));
            }
        }
        let written = header("<i8", &[3, 2]);
        let read = Header::read(&mut &written[..]).unwrap();
        assert_eq!((read.shape, read.descr.as_str()), (vec![3, 2], "<i8"));
        for (descr, bytes) in [
            ("|u1", Some(1)),
            ("<U5", Some(20)),
            ("|O", None),
            ("<M8[ns]", Some(8)),
            ("é", None),
        ] {
            let header = Header {
                descr: descr.into(),
                fortran: false,
                shape: vec![],
            };
            assert_eq!(header.item_bytes(), bytes, "{descr}");
        }
    }

    #[test]
    fn hostile_headers_are_refused_at_once() {
        let of =
            |shape: &str| format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
        let deep = |open: &str, close: &str| of(&(open.repeat(1500) + &close.repeat(1500)));
        let long = of(&format!("({})", "1,".repeat(65)));
        for text in [
            "",
            "{",
            "{}",
            "[]",
            "{'descr'}",
            "{'descr': '<f4'}",
            &of("(1"),
            &of("(-1,)"),
            &of("(1 2)"),
            &of("(99999999999999999999,)"),
            &of("2"),
            &of("(1,), 'shape': (1,)"),
            &of("(1,), 'x': (1,)"),
            &of("(1,)}, {"),
            "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
            "{'descr': '<f\\x34', 'fortran_order': False, 'shape': (1,), }",
            &deep("[", "]"),
            &deep("(", ")"),
            &deep("{", "}"),
            &long,
        ] {
            let error = Header::read(&mut &file(1, text)[..]).unwrap_err();
            assert!(error.starts_with("the header \""), "{error}");
            assert!(error.len() < 300, "{}", error.len());
        }
        // Nothing is allocated before the length is checked.
        let mut huge = file(2, "");
        huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = Header::read(&mut &huge[..]).unwrap_err();
        assert!(error.contains("4294967295 bytes"), "{error}");
        for (bytes, words) in [
            (&b"PK\x03\x04...."[..], "begins with \"PK"),
            (&b"\x93NUMPY\x09\x00"[..], "version 9"),
            (&b"\x93NUM"[..], "fill"),
        ] {
            let error = Header::read(&mut &bytes[..]).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
