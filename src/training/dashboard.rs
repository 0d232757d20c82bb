//! The dashboard on a terminal: burn-train's metrics and progress, through its renderer interface.
//!
//! burn-train's own dashboard has a fixed layout that needs a large terminal, a linear axis on
//! which the first steps hide all others, and a key that ends the program by a panic. This one
//! names the recipe and stage, keeps its curves when a run is resumed, shows the gates' choices,
//! and fits small terminals. No key loses a training: `q` and Ctrl-C end it after the step and
//! save; pressed again, they end it at once.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use burn::train::LearnerSummary;
use burn::train::metric::{MetricDefinition, MetricId};
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph};

use super::About;
use super::metrics::shown;
use crate::report::{brief, rounded, thousands};
use crate::stop::{Stop, leave};

/// Time between two redraws, and the longest delay of a key.
const TICK: Duration = Duration::from_millis(100);
/// Time over which the speed for the time left is measured.
const RECENT: Duration = Duration::from_secs(60);
/// Most points of a curve; beyond, every second one is dropped.
const POINTS: usize = 4000;
/// Narrowest terminal that shows a list of numbers beside the curve.
const WIDE: u16 = 70;
/// An axis is logarithmic if the highest value is more than this many times the lowest.
const LOGARITHMIC_FROM: f64 = 3.0;

/// Shades for a probability, from 0 to 1.
const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];

/// The dashboard; drawn on its own thread until dropped.
pub(super) struct Dashboard {
    state: Arc<Mutex<State>>,
    over: Arc<AtomicBool>,
    drawing: Option<JoinHandle<()>>,
}

impl Dashboard {
    /// Takes over the terminal. `log` holds the curves of earlier steps; `first` is the next step.
    ///
    /// # Errors
    /// When the terminal can't be used; the caller then prints lines.
    pub(super) fn start(
        about: &About,
        stage: &str,
        log: &Path,
        [first, steps]: [usize; 2],
        stop: &Stop,
    ) -> std::io::Result<Self> {
        let mut terminal = ratatui::try_init()?;
        let state = Arc::new(Mutex::new(State::new(
            about,
            stage,
            log,
            [first, steps],
            stop.clone(),
        )));
        let over = Arc::new(AtomicBool::new(false));
        let (shared, ended, stop) = (state.clone(), over.clone(), stop.clone());
        let drawing = std::thread::Builder::new()
            .name("dashboard".into())
            .spawn(move || {
                let mut told = false;
                while !ended.load(Ordering::Relaxed) {
                    // The signal handler has printed a line over the picture.
                    if stop.requested() && !told {
                        told = true;
                        let _ = terminal.clear();
                    }
                    let drawn = terminal.draw(|frame| shared.lock().draw(frame)).map(drop);
                    // A closed terminal must not end a training; if that is wanted, a signal says
                    // so.
                    if drawn.and_then(|()| keys(&shared, &stop)).is_err() {
                        break;
                    }
                }
            });
        let drawing = match drawing {
            Ok(drawing) => Some(drawing),
            Err(error) => {
                let _ = ratatui::try_restore();
                return Err(error);
            }
        };
        Ok(Self {
            state,
            over,
            drawing,
        })
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // On a closed terminal crossterm's `poll` (0.29) never returns; then the thread is
        // abandoned.
        let asked = Instant::now();
        while self
            .drawing
            .as_ref()
            .is_some_and(|drawing| !drawing.is_finished())
            && asked.elapsed() < 10 * TICK
        {
            std::thread::sleep(TICK / 10);
        }
        // On a closed terminal there is nothing to restore.
        let _ = ratatui::try_restore();
    }
}

/// Handles the keys pressed within one tick.
fn keys(state: &Mutex<State>, stop: &Stop) -> std::io::Result<()> {
    if !event::poll(TICK)? {
        return Ok(());
    }
    if let Event::Key(key) = event::read()?
        && key.kind != KeyEventKind::Release
    {
        match action(key) {
            Some(Action::Stop) if stop.insist() => {
                let _ = ratatui::try_restore();
                leave();
            }
            Some(Action::Stop) | None => {}
            Some(Action::Curve(by)) => state.lock().choose(by),
        }
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
enum Action {
    Stop,
    Curve(isize),
}

fn action(key: KeyEvent) -> Option<Action> {
    match key.code {
        KeyCode::Char('q' | 'Q') => Some(Action::Stop),
        // In raw mode the terminal delivers Ctrl-C as a key.
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(Action::Stop),
        KeyCode::Right | KeyCode::Down | KeyCode::Tab => Some(Action::Curve(1)),
        KeyCode::Left | KeyCode::Up | KeyCode::BackTab => Some(Action::Curve(-1)),
        _ => None,
    }
}

/// The displayed state.
struct State {
    about: About,
    stage: String,
    names: HashMap<MetricId, String>,
    /// `(step, value)` of each curve, by name.
    curves: BTreeMap<String, Vec<(f64, f64)>>,
    chosen: usize,
    /// Steps done, then all steps.
    done: usize,
    steps: usize,
    /// Recent times, with the steps done by then.
    recent: VecDeque<(Instant, usize)>,
    stop: Stop,
}

impl State {
    fn new(about: &About, stage: &str, log: &Path, [first, steps]: [usize; 2], stop: Stop) -> Self {
        let mut state = Self {
            about: about.clone(),
            stage: stage.to_owned(),
            names: HashMap::new(),
            curves: BTreeMap::new(),
            chosen: 0,
            done: first,
            steps,
            recent: VecDeque::from([(Instant::now(), first)]),
            stop,
        };
        // The curves of an earlier process. If the log can't be read, the training reports it.
        let text = std::fs::read_to_string(log).unwrap_or_default();
        for line in text.lines() {
            state.recall(line, first);
        }
        state
    }

    /// Adds the values of a line of `metrics.jsonl`.
    fn recall(&mut self, line: &str, first: usize) {
        let Ok(serde_json::Value::Object(record)) = serde_json::from_str(line) else {
            return;
        };
        let step = record.get("step").and_then(serde_json::Value::as_f64);
        let Some(step) = step.filter(|step| *step < first as f64) else {
            return;
        };
        for (name, value) in &record {
            let counts = ["step", "images", "skipped", "time"].contains(&name.as_str());
            if let (false, Some(value)) = (counts, value.as_f64()) {
                self.curves
                    .entry(name.clone())
                    .or_default()
                    .push((step + 1.0, value));
            }
        }
    }

    fn push(&mut self, name: &str, value: f64) {
        let step = (self.done + 1) as f64;
        let curve = self.curves.entry(name.to_owned()).or_default();
        if value.is_finite() {
            curve.push((step, value));
        }
        if curve.len() > POINTS {
            let mut keep = false;
            curve.retain(|_| {
                keep = !keep;
                keep
            });
        }
    }

    fn reach(&mut self, done: usize, now: Instant) {
        self.done = done;
        self.recent.push_back((now, done));
        // At least two are kept, so that a speed can be computed.
        while self.recent.len() > 2 && now.duration_since(self.recent[0].0) > RECENT {
            self.recent.pop_front();
        }
    }

    /// The time left at the recent speed.
    fn left(&self) -> Option<Duration> {
        let (&(then, before), &(now, done)) = (self.recent.front()?, self.recent.back()?);
        let steps = done.checked_sub(before).filter(|steps| *steps > 0)?;
        let one = now.duration_since(then).as_secs_f64() / steps as f64;
        Some(Duration::from_secs_f64(
            one * self.steps.saturating_sub(done) as f64,
        ))
    }

    fn choose(&mut self, by: isize) {
        let count = self.curves.len().max(1);
        self.chosen = (self.chosen as isize + by).rem_euclid(count as isize) as usize;
    }

    /// The loss first, the others sorted by name.
    fn order(&self) -> Vec<(&String, &Vec<(f64, f64)>)> {
        let mut all: Vec<_> = self.curves.iter().collect();
        all.sort_by_key(|(name, _)| (*name != "loss", (*name).clone()));
        all
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let gates = self.about.gates.lock().clone();
        let tall = frame.area().height >= 18;
        let heads = if tall { 2 } else { 1 };
        let strip = match (gates.is_empty(), tall) {
            (true, _) => 0,
            (false, true) => 3,
            (false, false) => 1,
        };
        let [head, gate_area, middle, bar, help] = Layout::vertical([
            Constraint::Length(heads),
            Constraint::Length(strip),
            Constraint::Min(3),
            Constraint::Length(1),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(Paragraph::new(self.head()), head);
        frame.render_widget(
            Paragraph::new(strip_lines(&gates, gate_area.width)),
            gate_area,
        );
        self.draw_curve(frame, middle);
        frame.render_widget(self.bar(), bar);
        frame.render_widget(Paragraph::new(help_line(self.stop.requested())), help);
    }

    fn head(&self) -> Vec<Line<'_>> {
        let (index, of) = self.about.place;
        vec![
            Line::from(vec![
                Span::from(self.about.recipe.as_str()).bold(),
                Span::from(format!("  stage {index} of {of}: ")),
                Span::from(self.stage.as_str()).bold(),
            ]),
            Line::from(self.about.run.display().to_string()).dim(),
        ]
    }

    fn draw_curve(&self, frame: &mut Frame<'_>, area: Rect) {
        let order = self.order();
        let Some((name, curve)) = order.get(self.chosen.min(order.len().saturating_sub(1))) else {
            let waiting = Paragraph::new("the first step is under way");
            frame.render_widget(waiting, area);
            return;
        };
        let plot = match area.width >= WIDE {
            false => area,
            true => {
                let [list, plot] =
                    Layout::horizontal([Constraint::Length(26), Constraint::Min(20)]).areas(area);
                let lines: Vec<Line<'_>> = (order.iter())
                    .map(|(other, curve)| {
                        let last = curve
                            .last()
                            .map_or_else(String::new, |(_, value)| rounded(*value));
                        let line = Line::from(format!(" {:<12} {last:>10}", shown(other)));
                        if other == name { line.reversed() } else { line }
                    })
                    .collect();
                frame.render_widget(Paragraph::new(lines), list);
                plot
            }
        };
        let last = curve.last().map_or(f64::NAN, |(_, value)| *value);
        let title = format!(" {} {} ", shown(name), rounded(last));
        let scale = Scale::of(curve);
        let points: Vec<(f64, f64)> = curve
            .iter()
            .map(|(step, value)| (*step, scale.place(*value)))
            .collect();
        let steps = [
            points.first().map_or(0.0, |(step, _)| *step),
            self.done.max(2) as f64,
        ];
        let data = Dataset::default()
            .marker(Marker::Braille)
            .graph_type(GraphType::Line)
            .data(&points);
        let x = Axis::default()
            .bounds(steps)
            .labels(steps.map(|step| thousands(step as usize)));
        let y = Axis::default().bounds(scale.bounds).labels(scale.labels());
        let chart = Chart::new(vec![data])
            .block(Block::bordered().title(title))
            .x_axis(x.style(Style::new().dim()))
            .y_axis(y.style(Style::new().dim()));
        frame.render_widget(chart, plot);
    }

    fn bar(&self) -> Gauge<'_> {
        let share = self.done as f64 / self.steps.max(1) as f64;
        let mut label = format!("step {}/{}", thousands(self.done), thousands(self.steps));
        if let Some(left) = self.left() {
            label += &format!("  {} left", brief(left));
        }
        Gauge::default().ratio(share.clamp(0.0, 1.0)).label(label)
    }
}

fn help_line(stopping: bool) -> Line<'static> {
    match stopping {
        true => Line::from("stopping after this step; q once more stops at once").bold(),
        false => Line::from("q stops after the step and saves   arrows choose the curve").dim(),
    }
}

/// One cell for each layer, darker the more probably it is kept; below it, if there is room, the
/// layers' numbers.
fn strip_lines(gates: &[f64], width: u16) -> Vec<Line<'static>> {
    if gates.is_empty() {
        return Vec::new();
    }
    let cell = match (usize::from(width).saturating_sub(6)) / gates.len() {
        0 | 1 => 1,
        2 => 2,
        _ => 3,
    };
    let shade = |probability: &f64| {
        let last = SHADES.len() - 1;
        SHADES[((probability * last as f64).round().clamp(0.0, last as f64)) as usize]
    };
    let strip: String = (gates.iter())
        .map(|probability| {
            let mut cells: String = std::iter::repeat_n(shade(probability), cell.min(2)).collect();
            cells.extend(std::iter::repeat_n(' ', cell - cell.min(2)));
            cells
        })
        .collect();
    let numbers: String = match cell {
        3 => (0..gates.len())
            .map(|layer| format!("{layer:<3}"))
            .collect(),
        _ => String::new(),
    };
    vec![
        Line::from(vec![Span::from("gates ").dim(), Span::from(strip)]),
        Line::from(format!("      {numbers}")).dim(),
    ]
}

/// An axis of values, logarithmic if they are positive and span a wide range.
struct Scale {
    logarithmic: bool,
    bounds: [f64; 2],
}

impl Scale {
    fn of(curve: &[(f64, f64)]) -> Self {
        let values = || curve.iter().map(|(_, value)| *value);
        let (low, high) = (
            values().fold(f64::INFINITY, f64::min),
            values().fold(f64::NEG_INFINITY, f64::max),
        );
        let logarithmic = low > 0.0 && high > LOGARITHMIC_FROM * low;
        let (low, high) = match logarithmic {
            true => (low.log10(), high.log10()),
            false => (low, high),
        };
        // A flat curve needs some height; an empty one gets a default.
        let bounds = match (high - low).is_finite() {
            true if high > low => [low, high],
            true => [
                low - 0.5 * low.abs().max(1e-9),
                high + 0.5 * high.abs().max(1e-9),
            ],
            false => [0.0, 1.0],
        };
        Self {
            logarithmic,
            bounds,
        }
    }

    fn place(&self, value: f64) -> f64 {
        if self.logarithmic {
            value.log10()
        } else {
            value
        }
    }

    fn labels(&self) -> [String; 3] {
        let [low, high] = self.bounds;
        [low, (low + high) / 2.0, high].map(|place| {
            let value = if self.logarithmic {
                10f64.powf(place)
            } else {
                place
            };
            rounded(value)
        })
    }
}

impl MetricsRendererTraining for Dashboard {
    fn update_train(&mut self, state: MetricState) {
        if let MetricState::Numeric(entry, value) = state {
            let mut shown = self.state.lock();
            if let Some(name) = shown.names.get(&entry.metric_id).cloned() {
                shown.push(&name, value.current());
            }
        }
    }

    fn update_valid(&mut self, _: MetricState) {}

    fn render_train(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        if let Some(step) = item.iteration {
            self.state.lock().reach(step, Instant::now());
        }
    }

    fn render_valid(&mut self, _: TrainingProgress, _: Vec<ProgressType>) {}

    fn on_train_end(
        &mut self,
        _: Option<LearnerSummary>,
    ) -> Result<(), Box<dyn core::error::Error>> {
        Ok(())
    }
}

impl MetricsRendererEvaluation for Dashboard {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}
    fn render_test(&mut self, _: EvaluationProgress, _: Vec<ProgressType>) {}
}

impl MetricsRenderer for Dashboard {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        let mut shown = self.state.lock();
        shown.names.insert(definition.metric_id, definition.name);
    }
}

#[cfg(test)]
mod tests;
