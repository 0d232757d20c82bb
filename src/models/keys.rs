//! What a configuration asks of whoever fills it: a recipe's table, a page that lists the keys, or
//! a check of values.

use super::Shape;

/// A key of a configuration.
#[derive(Debug, Clone, Copy)]
pub struct Key<T> {
    /// Its name.
    pub name: &'static str,
    /// Least value; of a real number, the value it must exceed.
    pub least: T,
    /// Greatest value.
    pub most: T,
    /// Value where none is given.
    pub default: T,
}

/// A demand on a whole number that depends on other keys.
pub struct Demand<'a> {
    /// Whether a value meets it.
    pub holds: &'a dyn Fn(usize) -> bool,
    /// What a value must be, after "must".
    pub must: String,
}

/// Gives the values of keys.
pub trait Keys {
    /// A whole number.
    fn integer(&mut self, key: Key<usize>, demand: Option<Demand<'_>>) -> usize;

    /// A real number.
    fn float(&mut self, key: Key<f64>) -> f64;

    /// Yes or no.
    fn boolean(&mut self, name: &'static str, default: bool) -> bool;

    /// One of some words, by its place among them; the first where none is given.
    fn choice(&mut self, name: &'static str, words: &[&'static str]) -> usize;
}

impl Shape {
    /// Reads the sizes of samples, which are `default` where none are given.
    #[rustfmt::skip]
    pub fn read(keys: &mut dyn Keys, default: Self) -> Self {
        let Self { channels, side, classes } = default;
        let mut size = |name, most, default| {
            keys.integer(Key { name, least: 1, most, default }, None)
        };
        Self {
            side: size("input_size", 4096, side),
            channels: size("channels", 1024, channels),
            classes: size("classes", 1_000_000, classes),
        }
    }
}

/// Sizes that transformers of an image's patches have in common.
pub(super) struct Tokens {
    /// Side of a patch.
    pub(super) patch_size: usize,
    /// Heads of an attention.
    pub(super) heads: usize,
    /// Width of a token.
    pub(super) width: usize,
}

impl Tokens {
    /// Reads the sizes; patches of images of side `input_size` are `patch_size` where none is
    /// given.
    pub(super) fn read(keys: &mut dyn Keys, input_size: usize, patch_size: usize) -> Self {
        let key = |name, most, default| Key {
            name,
            least: 1,
            most,
            default,
        };
        let divides = Demand {
            holds: &|patch| input_size.is_multiple_of(patch),
            must: format!("divide `input_size`, which is {input_size}"),
        };
        let patch_size = keys.integer(key("patch_size", 4096, patch_size), Some(divides));
        let heads = keys.integer(key("heads", 1024, 4), None);
        let divided = Demand {
            // The position table needs a multiple of 4.
            holds: &|width| width.is_multiple_of(heads) && width.is_multiple_of(4),
            must: format!("be a multiple of 4 and of `heads`, which is {heads}"),
        };
        let width = keys.integer(key("width", 65_536, 64), Some(divided));
        Self {
            patch_size,
            heads,
            width,
        }
    }
}

/// Asks of a configuration whether its own values lie where they must.
pub(super) struct Check<F: Fn(&str) -> f64> {
    /// The value of a key.
    pub(super) value: F,
    /// The first that does not.
    pub(super) problem: Option<String>,
}

impl<F: Fn(&str) -> f64> Check<F> {
    pub(super) fn new(value: F) -> Self {
        Self {
            value,
            problem: None,
        }
    }
}

impl<F: Fn(&str) -> f64> Keys for Check<F> {
    fn integer(&mut self, key: Key<usize>, demand: Option<Demand<'_>>) -> usize {
        let Key {
            name, least, most, ..
        } = key;
        // Sizes are far below 2^53, up to which every whole number is an f64.
        let value = (self.value)(name) as usize;
        let must = match demand {
            _ if !(least..=most).contains(&value) => Some(format!("lie in {least}..={most}")),
            Some(demand) if !(demand.holds)(value) => Some(demand.must),
            _ => None,
        };
        if let Some(must) = must {
            (self.problem).get_or_insert_with(|| format!("{name} is {value}, which must {must}"));
        }
        value
    }

    fn float(&mut self, key: Key<f64>) -> f64 {
        let Key {
            name, least, most, ..
        } = key;
        let value = (self.value)(name);
        if !(value > least && value <= most) {
            let why = || format!("{name} is {value}, which must lie above {least}, up to {most}");
            self.problem.get_or_insert_with(why);
        }
        value
    }

    fn boolean(&mut self, name: &'static str, _: bool) -> bool {
        (self.value)(name) != 0.0
    }

    fn choice(&mut self, name: &'static str, _: &[&'static str]) -> usize {
        (self.value)(name) as usize
    }
}
