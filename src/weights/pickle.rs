//! Python's pickles, read as data: nothing that a pickle names is ever called.
//!
//! A pickle is a program for a stack machine (CPython's `pickletools` documents the instructions).
//! It is run here with calls and instances kept as [`Node::Call`]: the name of the callee and its
//! arguments. Modules that know the names, such as [`torch`](super::torch), interpret them.

use std::collections::HashMap;

/// Index of a value in a [`Pickle`].
pub(super) type Id = usize;

/// A value. It refers to others by index, since a pickle may use a value several times, or within
/// itself.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    None,
    Bool(bool),
    /// None if it doesn't fit.
    Int(Option<i64>),
    Float(f64),
    Text(String),
    Bytes,
    /// A list, tuple or set.
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// `module name`
    Global(String),
    /// The callee and its tuple of arguments. An instance is a call of its class.
    Call(Id, Id),
    /// A training script's arguments, an object with attributes: the dict of them, once it is set.
    Namespace(Option<Id>),
    /// A reference to data outside the pickle.
    Persistent(Id),
}

/// The values of a pickle.
#[derive(Debug)]
pub(super) struct Pickle {
    nodes: Vec<Node>,
    root: Id,
}

impl Pickle {
    /// Reads a pickle of protocol 0 to 5.
    ///
    /// # Errors
    /// What is wrong, and at which byte.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        Self::read_first(bytes).map(|(pickle, _)| pickle)
    }

    /// Reads the first of several pickles, and returns its size in bytes too.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn read_first(bytes: &[u8]) -> Result<(Self, usize), String> {
        let mut machine = Machine {
            bytes,
            at: 0,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        match machine.run() {
            Ok(root) => {
                let length = machine.at;
                let nodes = machine.nodes;
                Ok((Self { nodes, root }, length))
            }
            Err(problem) => Err(format!("the pickle {problem} at byte {}", machine.at)),
        }
    }

    pub(super) fn root(&self) -> &Node {
        &self.nodes[self.root]
    }

    /// All values, in the order of their creation.
    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub(super) fn get(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// The items of a list or tuple.
    pub(super) fn list(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Node::List(items) => Some(items),
            _ => None,
        }
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A number that is a valid size.
    pub(super) fn size(&self, id: Id) -> Option<usize> {
        match self.get(id) {
            Node::Int(value) => usize::try_from((*value)?).ok(),
            _ => None,
        }
    }

    /// The values of a tuple of sizes.
    pub(super) fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        let sizes = self.list(id).filter(|sizes| sizes.len() <= MOST_SIDES)?;
        sizes.iter().map(|id| self.size(*id)).collect()
    }

    /// A call's callee, as `module name`, and its arguments.
    pub(super) fn call(&self, id: Id) -> Option<(&str, &[Id])> {
        match self.get(id) {
            Node::Call(callee, arguments) => match self.get(*callee) {
                Node::Global(name) => Some((name, self.list(*arguments)?)),
                _ => None,
            },
            _ => None,
        }
    }

    /// The value at a text key of a dict, or of a namespace's attribute.
    pub(super) fn entry(&self, dict: &Node, key: &str) -> Option<Id> {
        let dict = match dict {
            Node::Namespace(attributes) => self.get((*attributes)?),
            other => other,
        };
        match dict {
            Node::Dict(entries) => entries
                .iter()
                .rev() // the last of one key counts
                .find(|(name, _)| self.text(*name) == Some(key))
                .map(|(_, value)| *value),
            _ => None,
        }
    }
}

type Result_<T> = Result<T, &'static str>;

/// Most instructions in a pickle; a training checkpoint of a thousand tensors has a hundred
/// thousand.
const MOST_INSTRUCTIONS: usize = 4_000_000;

/// Most dimensions of a tensor, PyTorch's own limit.
const MOST_SIDES: usize = 64;

const ENDS: &str = "ends early";
const EMPTY: &str = "takes from an empty stack";

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack at its marks.
    marks: Vec<usize>,
    memo: HashMap<usize, Id>,
}

impl<'a> Machine<'a> {
    fn take(&mut self, count: usize) -> Result_<&'a [u8]> {
        let end = self.at.checked_add(count).ok_or(ENDS)?;
        let bytes = self.bytes.get(self.at..end).ok_or(ENDS)?;
        self.at = end;
        Ok(bytes)
    }

    /// A little-endian number of `count` bytes.
    fn number(&mut self, count: usize) -> Result_<usize> {
        let bytes = self.take(count)?.iter().rev();
        let number = bytes.fold(0u64, |number, byte| number << 8 | u64::from(*byte));
        usize::try_from(number).map_err(|_| ENDS)
    }

    /// The bytes up to the end of the line, which is consumed.
    fn line(&mut self) -> Result_<&'a str> {
        let length = self.bytes[self.at..].iter().position(|byte| *byte == b'\n');
        let line = self.take(length.ok_or(ENDS)?)?;
        self.at += 1;
        std::str::from_utf8(line).map_err(|_| "holds text that is not UTF-8")
    }

    fn text(&mut self, length: usize) -> Result_<Node> {
        let bytes = self.take(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| "holds text that is not UTF-8")?;
        Ok(Node::Text(text.to_owned()))
    }

    fn skip(&mut self, length: usize) -> Result_<Node> {
        self.take(length)?;
        Ok(Node::Bytes)
    }

    fn make(&mut self, node: Node) -> Id {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn push(&mut self, node: Node) {
        let id = self.make(node);
        self.stack.push(id);
    }

    fn pop(&mut self) -> Result_<Id> {
        // Items below the last mark are out of reach for the instructions above it.
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err(EMPTY);
        }
        self.stack.pop().ok_or(EMPTY)
    }

    fn top(&self) -> Result_<Id> {
        self.stack.last().copied().ok_or(EMPTY)
    }

    /// All items since the last mark.
    fn marked(&mut self) -> Result_<Vec<Id>> {
        let mark = self.marks.pop().ok_or("has no mark")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn tuple(&mut self, count: usize) -> Result_<()> {
        let mut items = Vec::new();
        for _ in 0..count {
            items.insert(0, self.pop()?);
        }
        self.push(Node::List(items));
        Ok(())
    }

    fn remember(&mut self, place: usize) -> Result_<()> {
        let id = self.top()?;
        self.memo.insert(place, id);
        Ok(())
    }

    fn recall(&mut self, place: usize) -> Result_<()> {
        let id = self.memo.get(&place).ok_or("recalls what it never made")?;
        self.stack.push(*id);
        Ok(())
    }

    fn call(&mut self) -> Result_<()> {
        let arguments = self.pop()?;
        let callee = self.pop()?;
        let class = match &self.nodes[callee] {
            Node::Global(class) => class.as_str(),
            _ => "",
        };
        // The two classes whose instances are read: an ordered dict is a dict, a namespace has
        // attributes.
        let node = match class {
            "collections OrderedDict" => Node::Dict(Vec::new()),
            "argparse Namespace" => Node::Namespace(None),
            _ => Node::Call(callee, arguments),
        };
        self.push(node);
        Ok(())
    }

    fn append(&mut self, items: Vec<Id>) -> Result_<()> {
        let list = self.top()?;
        // Objects other than lists may also be extended; their content is not read.
        if let Node::List(list) = &mut self.nodes[list] {
            list.extend(items);
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Result_<()> {
        let dict = self.top()?;
        if let Node::Dict(entries) = &mut self.nodes[dict] {
            let (pairs, rest) = items.as_chunks::<2>();
            if !rest.is_empty() {
                return Err("has a key without a value");
            }
            entries.extend(pairs.iter().map(|[key, value]| (*key, *value)));
        }
        Ok(())
    }

    fn run(&mut self) -> Result_<Id> {
        // An instruction makes at most two values, which bounds a pickle's memory.
        for _ in 0..MOST_INSTRUCTIONS {
            let instruction = self.take(1)?[0];
            match instruction {
                b'.' => return self.pop(),
                0x80 => drop(self.take(1)?), // PROTO
                0x95 => drop(self.take(8)?), // FRAME
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.marked()?),
                b'2' => self.stack.push(self.top()?),
                b'N' => self.push(Node::None),
                0x88 => self.push(Node::Bool(true)),
                0x89 => self.push(Node::Bool(false)),
                b'I' => {
                    let node = match self.line()? {
                        "01" => Node::Bool(true),
                        "00" => Node::Bool(false),
                        digits => Node::Int(digits.parse().ok()),
                    };
                    self.push(node);
                }
                b'L' => {
                    let digits = self.line()?.trim_end_matches('L');
                    self.push(Node::Int(digits.parse().ok()));
                }
                b'J' => {
                    let value = self.number(4)? as u32 as i32;
                    self.push(Node::Int(Some(value.into())));
                }
                b'K' | b'M' => {
                    let value = self.number(if instruction == b'K' { 1 } else { 2 })?;
                    self.push(Node::Int(i64::try_from(value).ok()));
                }
                0x8a | 0x8b => {
                    let length = self.number(if instruction == 0x8a { 1 } else { 4 })?;
                    let bytes = self.take(length)?;
                    self.push(Node::Int(long(bytes)));
                }
                b'G' => {
                    let bytes = self.take(8)?.first_chunk().ok_or(ENDS)?;
                    self.push(Node::Float(f64::from_be_bytes(*bytes)));
                }
                b'F' => {
                    let value = self.line()?.parse().map_err(|_| "holds no number")?;
                    self.push(Node::Float(value));
                }
                0x8c | b'X' | 0x8d => {
                    let length = self.number(match instruction {
                        0x8c => 1,
                        b'X' => 4,
                        _ => 8,
                    })?;
                    let node = self.text(length)?;
                    self.push(node);
                }
                b'V' => {
                    let text = self.line()?.to_owned();
                    self.push(Node::Text(text));
                }
                b'S' => {
                    let text = self.line()?.trim_matches(['\'', '"']).to_owned();
                    self.push(Node::Text(text));
                }
                b'U' | b'C' | b'T' | b'B' | 0x8e | 0x96 => {
                    let length = self.number(match instruction {
                        b'U' | b'C' => 1,
                        b'T' | b'B' => 4,
                        _ => 8,
                    })?;
                    // Python 2's strings; only text is read from them.
                    let node = match instruction {
                        b'U' | b'T' => self.text(length)?,
                        _ => self.skip(length)?,
                    };
                    self.push(node);
                }
                b')' | b']' | 0x8f => self.push(Node::List(Vec::new())),
                b'}' => self.push(Node::Dict(Vec::new())),
                b't' | b'l' | 0x91 => {
                    let items = self.marked()?;
                    self.push(Node::List(items));
                }
                0x85..=0x87 => self.tuple(usize::from(instruction - 0x84))?,
                b'd' => {
                    let items = self.marked()?;
                    self.push(Node::Dict(Vec::new()));
                    self.set(&items)?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' | 0x90 => {
                    let items = self.marked()?;
                    self.append(items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set(&[key, value])?;
                }
                b'u' => {
                    let items = self.marked()?;
                    self.set(&items)?;
                }
                b'c' => {
                    let module = self.line()?;
                    let name = self.line()?;
                    self.push(Node::Global(format!("{module} {name}")));
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let node = match (&self.nodes[module], &self.nodes[name]) {
                        (Node::Text(module), Node::Text(name)) => {
                            Node::Global(format!("{module} {name}"))
                        }
                        _ => return Err("names a class by something else than text"),
                    };
                    self.push(node);
                }
                b'R' | 0x81 => self.call()?,
                0x92 => {
                    // Keyword arguments are not read.
                    self.pop()?;
                    self.call()?;
                }
                b'o' => {
                    let items = self.marked()?;
                    let (class, arguments) = items.split_first().ok_or(EMPTY)?;
                    let arguments = self.make(Node::List(arguments.to_vec()));
                    self.push(Node::Call(*class, arguments));
                }
                b'i' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let class = self.make(Node::Global(format!("{module} {name}")));
                    let items = self.marked()?;
                    let arguments = self.make(Node::List(items));
                    self.push(Node::Call(class, arguments));
                }
                // Sets an object's state, which is only read for a namespace.
                b'b' => {
                    let state = self.pop()?;
                    let object = self.top()?;
                    if let Node::Namespace(attributes) = &mut self.nodes[object] {
                        *attributes = Some(state);
                    }
                }
                b'p' | b'g' => {
                    let place = self.line()?.parse().map_err(|_| "holds no number")?;
                    if instruction == b'p' {
                        self.remember(place)?;
                    } else {
                        self.recall(place)?;
                    }
                }
                b'q' | b'r' => {
                    let place = self.number(if instruction == b'q' { 1 } else { 4 })?;
                    self.remember(place)?;
                }
                b'h' | b'j' => {
                    let place = self.number(if instruction == b'h' { 1 } else { 4 })?;
                    self.recall(place)?;
                }
                0x94 => self.remember(self.memo.len())?,
                b'Q' => {
                    let id = self.pop()?;
                    self.push(Node::Persistent(id));
                }
                b'P' => {
                    let text = self.line()?.to_owned();
                    let id = self.make(Node::Text(text));
                    self.push(Node::Persistent(id));
                }
                _ => {
                    self.at -= 1;
                    return Err("holds an instruction that is none");
                }
            }
        }
        Err("has more than four million instructions")
    }
}

/// A signed little-endian number of any length.
fn long(bytes: &[u8]) -> Option<i64> {
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut whole = [if negative { 0xff } else { 0 }; 8];
    // Beyond eight bytes, only sign bytes may follow.
    let (low, high) = bytes.split_at(bytes.len().min(8));
    whole[..low.len()].copy_from_slice(low);
    let value = i64::from_le_bytes(whole);
    let fits = high.iter().all(|byte| *byte == whole[7]) && (value < 0) == negative;
    fits.then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_calls_are_kept_as_data() {
        // {"a": (1, -2, 300, 70000, True, None, 1.5), "o": OrderedDict(), "x": os.system("true")},
        // in protocol 2.
        let mut bytes = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01(K\x01J\xfe\xff\xff\xffM\x2c\x01J\x70\x11\x01\x00\x88NG\x3f\xf8\0\0\0\0\0\0tq\x02".to_vec();
        bytes.extend(b"X\x01\x00\x00\x00occollections\nOrderedDict\n)R");
        bytes.extend(b"X\x01\x00\x00\x00xcos\nsystem\nX\x04\x00\x00\x00true\x85Ru.");
        let pickle = Pickle::read(&bytes).unwrap();
        let entry = |key| pickle.entry(pickle.root(), key).unwrap();
        let values: Vec<_> = pickle
            .list(entry("a"))
            .unwrap()
            .iter()
            .map(|id| pickle.get(*id).clone())
            .collect();
        let int = |value| Node::Int(Some(value));
        assert_eq!(
            values,
            [
                int(1),
                int(-2),
                int(300),
                int(70000),
                Node::Bool(true),
                Node::None,
                Node::Float(1.5)
            ]
        );
        assert_eq!(pickle.get(entry("o")), &Node::Dict(Vec::new()));
        let (name, arguments) = pickle.call(entry("x")).unwrap();
        assert_eq!(
            (name, pickle.text(arguments[0])),
            ("os system", Some("true"))
        );
    }

    #[test]
    fn the_attributes_of_a_namespace_are_read() {
        // {"args": Namespace(model="SiT-S/2"), "own": Namespace of itself}, in protocol 2.
        let mut bytes = b"\x80\x02}(X\x04\x00\x00\x00args".to_vec();
        bytes.extend(
            b"cargparse\nNamespace\n)\x81}X\x05\x00\x00\x00modelX\x07\x00\x00\x00SiT-S/2sb",
        );
        bytes.extend(b"X\x03\x00\x00\x00owncargparse\nNamespace\n)\x81q\x01h\x01bu.");
        let pickle = Pickle::read(&bytes).unwrap();
        let entry = |key| pickle.entry(pickle.root(), key).unwrap();
        let model = pickle.entry(pickle.get(entry("args")), "model").unwrap();
        assert_eq!(pickle.text(model), Some("SiT-S/2"));
        assert_eq!(pickle.entry(pickle.get(entry("own")), "model"), None);
    }

    #[test]
    fn numbers_of_any_length() {
        assert_eq!(long(&[]), Some(0));
        assert_eq!(long(&[0xff]), Some(-1));
        assert_eq!(long(&[0xff, 0]), Some(255));
        assert_eq!(long(&i64::MIN.to_le_bytes()), Some(i64::MIN));
        assert_eq!(long(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0]), None);
        assert_eq!(long(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Some(1));
    }

    #[test]
    fn what_a_pickle_makes_is_bounded() {
        let error = Pickle::read(&vec![b'N'; MOST_INSTRUCTIONS + 1]).unwrap_err();
        assert!(error.contains("four million instructions"), "{error}");
        let shape = |sides: usize| {
            let bytes = [b"(", &b"K\x01".repeat(sides)[..], b"t."].concat();
            let pickle = Pickle::read(&bytes).unwrap();
            pickle.sizes(pickle.root).map(|sizes| sizes.len())
        };
        assert_eq!(shape(MOST_SIDES), Some(MOST_SIDES));
        assert_eq!(shape(MOST_SIDES + 1), None);
    }

    #[test]
    fn damage_is_an_error_wherever_it_is() {
        let whole = b"\x80\x02}q\x00(X\x01\x00\x00\x00a(K\x01K\x02tu.";
        assert!(Pickle::read(whole).is_ok());
        for length in 0..whole.len() {
            assert!(Pickle::read(&whole[..length]).is_err(), "{length} bytes");
        }
        // Reading ends without a panic whatever a byte is changed to.
        for at in 0..whole.len() {
            for byte in 0..=255 {
                let mut bytes = whole.to_vec();
                bytes[at] = byte;
                let _ = Pickle::read(&bytes);
            }
        }
    }
}
