//! `[sweep]`: one recipe, run with many settings.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use super::Recipe;
use crate::random::{Stream, permutation};
use crate::recipe::document::diagnostic::{Diagnostics, Origin};
use crate::recipe::document::reader::{Section, Sink};
use crate::recipe::document::{Document, Node, Value};

/// Which settings the recipe is run with: every case, under every combination of the grid, with
/// every seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Sweep {
    /// Number of seeds, from the recipe's `seed` upwards; default 1.
    pub seeds: u64,
    /// Lists of values by key, as in `stage.student.lr = [1e-3, 3e-3]`: all combinations are run.
    pub grid: Vec<Axis>,
    /// Most combinations of the grid, drawn at random from the recipe's `seed`; default: all.
    pub draws: Option<usize>,
    /// Settings with a name, `[[sweep.case]]`.
    pub cases: Vec<Case>,
}

/// A key of the grid, and its values.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    /// The key, as `--set` takes it.
    pub key: String,
    values: Vec<Node>,
}

/// Settings with a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// The name, in tables and in the names of folders.
    pub name: String,
    /// Stages that are run; default: all.
    pub stages: Option<Vec<String>>,
    /// Values by key, as in `set.stage.prune = { method = "shortgpt", keep = 14 }`.
    pub set: Vec<(String, Node)>,
    /// Lists of values by key, as of the sweep, for this case alone.
    pub grid: Vec<Axis>,
    origin: Origin,
}

/// A recipe of a sweep, and what sets it apart.
#[derive(Clone, Debug)]
pub struct Point {
    /// The case's name, if the sweep has cases.
    pub case: Option<String>,
    /// Values of the grid by key.
    pub settings: BTreeMap<String, String>,
    /// The recipe, with its seed.
    pub recipe: Recipe,
}

impl fmt::Display for Point {
    /// `learned lr=0.001 seed=1`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let label = label(self.case.as_deref(), &self.settings);
        let gap = if label.is_empty() { "" } else { " " };
        write!(f, "{label}{gap}seed={}", self.recipe.seed)
    }
}

/// `learned lr=0.001`, of a case and settings by key; keys that end alike are written out.
pub(crate) fn label(case: Option<&str>, settings: &BTreeMap<String, String>) -> String {
    fn last(key: &str) -> &str {
        key.rsplit('.').next().unwrap_or(key)
    }
    let short = |key: &str| {
        let alike = settings.keys().filter(|other| last(other) == last(key));
        match alike.count() {
            1 => last(key).to_owned(),
            _ => key.to_owned(),
        }
    };
    let settings = settings.iter();
    let settings = settings.map(|(key, value)| format!("{}={value}", short(key)));
    let parts: Vec<String> = case
        .map(str::to_owned)
        .into_iter()
        .chain(settings)
        .collect();
    parts.join(" ")
}

/// Most seeds of a sweep.
pub const MOST_SEEDS: u64 = 1000;
/// Most combinations of a grid.
const MOST_COMBINATIONS: usize = 100_000;
/// Most runs of a sweep.
const MOST_RUNS: usize = 10_000;

impl Sweep {
    /// A sweep over seeds alone.
    pub fn of_seeds(seeds: u64) -> Self {
        Self {
            seeds,
            grid: Vec::new(),
            draws: None,
            cases: Vec::new(),
        }
    }

    pub(super) fn read(section: &Section<'_>) -> Option<Self> {
        let seeds = section.integer("seeds", 1..=MOST_SEEDS).or(1);
        let grid = read_grid(section);
        let draws = section.integer("draws", 1..=MOST_RUNS).optional();
        let mut cases: Vec<Case> = Vec::new();
        for case in section.sections("case").or(Vec::new()) {
            let name = case
                .string("name")
                .check(|name| super::is_name(name), super::NAME_RULE)
                .check(
                    |name| cases.iter().all(|known| known.name != *name),
                    "an earlier case is called so as well",
                )
                .required();
            let stages = case.list("stages", |node| node.string().map(str::to_owned));
            let stages = stages.optional();
            let set = case.section("set").optional();
            let set = set.map(|set| leaves(set.table())).unwrap_or_default();
            let grid = read_grid(&case);
            let origin = case.header().clone();
            case.finish();
            cases.push(Case {
                name: name?.to_owned(),
                stages,
                set,
                grid,
                origin,
            });
        }
        let sweep = Self {
            seeds,
            grid,
            draws,
            cases,
        };
        let runs = sweep.cases().iter().try_fold(0usize, |all, case| {
            let axes = sweep.axes(*case);
            let combinations = axes
                .iter()
                .try_fold(1usize, |all, axis| all.checked_mul(axis.values.len()))
                // Draws too are made from a list of all.
                .filter(|all| *all <= MOST_COMBINATIONS)?;
            let runs = draws.map_or(combinations, |draws| combinations.min(draws));
            all.checked_add(runs.checked_mul(seeds as usize)?)
        });
        if runs.is_none_or(|runs| runs > MOST_RUNS) {
            section.fault(format!(
                "these are more than {MOST_RUNS} runs, or draws from more than {MOST_COMBINATIONS} combinations"
            ));
            return None;
        }
        Some(sweep)
    }

    /// Every case, or none.
    fn cases(&self) -> Vec<Option<&Case>> {
        match self.cases.is_empty() {
            true => vec![None],
            false => self.cases.iter().map(Some).collect(),
        }
    }

    /// The grid of a case: everyone's, and its own, which goes before.
    fn axes<'a>(&'a self, case: Option<&'a Case>) -> Vec<&'a Axis> {
        let own = case.map_or(&[][..], |case| &case.grid);
        let others = |axis: &&Axis| own.iter().all(|mine| mine.key != axis.key);
        self.grid.iter().filter(others).chain(own).collect()
    }

    /// The recipes, case by case, combination by combination, seed by seed. `base` is the recipe of
    /// `document`.
    ///
    /// # Errors
    /// The mistakes of all of them.
    pub fn points(&self, base: &Recipe, document: &Document) -> Result<Vec<Point>, Diagnostics> {
        let mut plain = document.clone();
        plain.remove("sweep");
        let (mut points, mut faults, mut known) = (Vec::new(), Vec::new(), HashSet::new());
        for case in self.cases() {
            let axes = self.axes(case);
            let total: usize = axes.iter().map(|axis| axis.values.len()).product();
            let mut combinations: Vec<usize> = (0..total).collect();
            if let Some(draws) = self.draws {
                combinations = permutation(base.seed, Stream::Sweep, 0, total);
                combinations.truncate(draws);
                combinations.sort_unstable();
            }
            for combination in combinations {
                let (mut document, mut wrong) = (plain.clone(), Vec::new());
                if let Some(Case {
                    stages: Some(stages),
                    origin,
                    ..
                }) = case
                {
                    wrong.extend(document.keep_stages(stages, origin).err());
                }
                for (key, node) in case.iter().flat_map(|case| &case.set) {
                    wrong.extend(document.put(key, node).err());
                }
                let (mut rest, mut settings) = (combination, BTreeMap::new());
                // The last key's values change first.
                for axis in axes.iter().rev() {
                    let node = &axis.values[rest % axis.values.len()];
                    rest /= axis.values.len();
                    wrong.extend(document.put(&axis.key, node).err());
                    settings.insert(axis.key.clone(), node.value.to_string());
                }
                let sink = Sink::new(wrong);
                let recipe = Recipe::read(&document, &sink);
                let wrong = sink.into_faults();
                match recipe {
                    Some(recipe) if wrong.is_empty() => {
                        points.extend((0..self.seeds).map(|seed| Point {
                            case: case.map(|case| case.name.clone()),
                            settings: settings.clone(),
                            recipe: Recipe {
                                seed: recipe.seed.saturating_add(seed),
                                ..recipe.clone()
                            },
                        }));
                    }
                    _ => faults.extend(wrong.into_iter().filter_map(|mut fault| {
                        if let Some(case) = case {
                            fault.message += &format!(" (case `{}`)", case.name);
                        }
                        // Points of one case make the same mistake.
                        known.insert(fault.message.clone()).then_some(fault)
                    })),
                }
            }
        }
        match faults.is_empty() {
            true => Ok(points),
            false => Err(document.diagnostics(faults)),
        }
    }
}

/// The lists of values under `grid`.
fn read_grid(section: &Section<'_>) -> Vec<Axis> {
    let grid = section.section("grid").optional();
    let mut axes = Vec::new();
    for (key, node) in grid.iter().flat_map(|grid| leaves(grid.table())) {
        match &node.value {
            Value::Array(values) if !values.is_empty() => axes.push(Axis {
                key,
                values: values.clone(),
            }),
            Value::Array(_) => section.push(node.fault(format!("`{key}`: must not be empty"))),
            other => section.push(node.fault(format!(
                "`{key}`: expected a list of values, found {}",
                other.kind()
            ))),
        }
    }
    axes
}

/// Everything in a table but tables, by its path; `{ a = { b = 1 } }` has `a.b`.
fn leaves(table: &crate::recipe::document::Table) -> Vec<(String, Node)> {
    let mut found = Vec::new();
    for (key, entry) in table {
        match &entry.node.value {
            Value::Table(inner) => {
                let inner = leaves(inner).into_iter();
                found.extend(inner.map(|(rest, node)| (format!("{key}.{rest}"), node)));
            }
            _ => found.push((key.clone(), entry.node.clone())),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::recipe::schema::StageKind;
    use crate::recipe::schema::prune::PruneMethod;

    const BASE: &str = "seed = 5\n\
        [[stage]]\nkind = 'prune'\nfrom = 'embedded:digits-teacher'\nmethod = 'oracle'\n\
        [[stage]]\nkind = 'recover'\nname = 'student'\nmethod = 'fine-tune'\nsteps = 10\n\
        [[stage]]\nkind = 'evaluate'\ncompare = ['prune', 'student']\n";

    fn points(sweep: &str) -> Result<Vec<Point>, String> {
        let document = Document::parse(Path::new("x.toml"), &format!("{BASE}{sweep}")).unwrap();
        let recipe = Recipe::from_document(&document).map_err(|error| error.to_string())?;
        let sweep = recipe.sweep.clone().expect("there is a sweep");
        (sweep.points(&recipe, &document)).map_err(|error| error.to_string())
    }

    #[test]
    fn cases_and_the_grid_and_seeds_are_combined() {
        let all = points(
            "[sweep]\nseeds = 2\n\
             [sweep.grid]\nstage.student = { lr = [1e-3, 2e-3], steps = [10, 20, 30] }\n\
             [[sweep.case]]\nname = 'oracle'\n\
             [[sweep.case]]\nname = 'bi'\nset.stage.prune = { method = 'shortgpt', keep = 6 }\n\
             [[sweep.case]]\nname = 'some'\ngrid.stage.prune = { method = ['first', 'uniform'], keep = [2, 3] }\n",
        )
        .unwrap();
        assert_eq!(all.len(), 2 * 6 * 2 + 6 * 4 * 2);
        let names: Vec<String> = all[..4].iter().map(ToString::to_string).collect();
        assert_eq!(
            names,
            [
                "oracle lr=0.001 steps=10 seed=5",
                "oracle lr=0.001 steps=10 seed=6",
                "oracle lr=0.001 steps=20 seed=5",
                "oracle lr=0.001 steps=20 seed=6",
            ]
        );
        let last = &all[all.len() - 1];
        assert_eq!(
            last.to_string(),
            "some keep=3 method=uniform lr=0.002 steps=30 seed=6"
        );
        let last = &all[23];
        assert_eq!(last.to_string(), "bi lr=0.002 steps=30 seed=6");
        assert_eq!(last.recipe.sweep, None);
        let StageKind::Prune(prune) = &last.recipe.stages[0].kind else {
            panic!("it is called prune");
        };
        assert!(matches!(&prune.method, PruneMethod::ShortGpt(scored) if scored.keep == 6));
        let optimisation = last.recipe.stages[1].kind.optimisation().unwrap();
        assert_eq!((optimisation.steps, optimisation.lr), (30, 2e-3));
    }

    #[test]
    fn draws_are_some_of_the_grid_and_differ_by_seed() {
        let drawn = |seed: u64| -> Vec<String> {
            let text = format!(
                "[sweep]\ndraws = 4\n[sweep.grid]\nseed = [{seed}]\nstage.student.steps = [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
            );
            let document = Document::parse(Path::new("x.toml"), &format!("{BASE}{text}")).unwrap();
            let mut recipe = Recipe::from_document(&document).unwrap();
            recipe.seed = seed;
            let sweep = recipe.sweep.clone().unwrap();
            let points = sweep.points(&recipe, &document).unwrap();
            points.iter().map(ToString::to_string).collect()
        };
        assert_eq!(drawn(1).len(), 4);
        assert_eq!(drawn(1), drawn(1));
        let steps = |all: Vec<String>| -> Vec<String> {
            let part = |name: &String| name.split(' ').nth(1).unwrap().to_owned();
            all.iter().map(part).collect()
        };
        assert_ne!(steps(drawn(1)), steps(drawn(2)));
    }

    #[test]
    fn a_case_has_a_grid_of_its_own() {
        let text = "[sweep]\ngrid.stage.student = { lr = [1e-3, 2e-3], steps = [10, 20] }\n\
             [[sweep.case]]\nname = 'a'\ngrid.stage.student.steps = [5]\n";
        let all = points(text).unwrap();
        let names: Vec<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(
            names,
            ["a lr=0.001 steps=5 seed=5", "a lr=0.002 steps=5 seed=5"]
        );
        for point in &all {
            let optimisation = point.recipe.stages[1].kind.optimisation().unwrap();
            assert_eq!(optimisation.steps, 5);
        }
        let alike = "[sweep.grid]\nstage.student.steps = [5]\nstage.evaluate.steps = [4]\n";
        let name = points(alike).unwrap()[0].to_string();
        assert_eq!(name, "stage.evaluate.steps=4 stage.student.steps=5 seed=5");
    }

    #[test]
    fn a_case_may_run_some_stages_alone() {
        let all = points(
            "[[sweep.case]]\nname = 'teacher'\nstages = ['evaluate']\nset.stage.evaluate.compare = ['embedded:digits-teacher']\n",
        );
        let all = all.unwrap();
        assert_eq!(all[0].recipe.stages.len(), 1);
        assert_eq!(all[0].to_string(), "teacher seed=5");
    }

    #[test]
    fn mistakes_are_reported_where_they_are_written() {
        let told = |sweep: &str| points(sweep).unwrap_err();
        let case = told("[[sweep.case]]\nname = 'a'\nset.stage.prune.mehtod = 'first'\n");
        assert!(case.contains("x.toml:16:"), "{case}");
        assert!(case.contains("unknown key `mehtod`"), "{case}");
        assert!(case.contains("(case `a`)"), "{case}");
        let grid = told("[sweep.grid]\nstage.studnet.lr = [1e-3, 2e-3]\n");
        assert!(grid.contains("did you mean `student`?"), "{grid}");
        assert_eq!(grid.matches("there is no").count(), 1, "{grid}");
        let value = told("[sweep.grid]\nstage.student.lr = [1e-3, -1]\n");
        assert!(value.contains("x.toml:15:27"), "{value}");
        let wide: String = (0..12)
            .map(|key| format!("stage.student.key{key} = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]\n"))
            .collect();
        let wide = format!("[sweep]\ndraws = 2\n[sweep.grid]\n{wide}");
        for (sweep, expected) in [
            ("[sweep.grid]\nseed = 3\n", "expected a list of values"),
            ("[sweep.grid]\nseed = []\n", "must not be empty"),
            ("[sweep]\ndraws = 0\n", "`draws`"),
            ("[sweep]\nseed = 3\n", "did you mean `seeds`?"),
            (
                "[[sweep.case]]\nname = 'a'\n[[sweep.case]]\nname = 'a'\n",
                "called so",
            ),
            (
                "[[sweep.case]]\nname = 'a'\nstages = ['x']\n",
                "no stage is called `x`",
            ),
            (
                "[sweep]\nseeds = 1000\ngrid.seed = [1,2,3,4,5,6,7,8,9,10,11]\n",
                "more than 10000 runs",
            ),
            // Twelve keys of ten values: a list of all combinations would not fit any memory.
            (&wide, "more than 100000 combinations"),
        ] {
            let found = told(sweep);
            assert!(found.contains(expected), "{sweep}: {found}");
        }
    }
}
