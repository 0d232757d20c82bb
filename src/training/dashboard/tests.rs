use std::path::PathBuf;

use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::*;

fn state(gates: &[f64]) -> State {
    let about = About {
        recipe: "quickstart".into(),
        place: (2, 14),
        run: PathBuf::from("artifacts/runs/quickstart/007"),
        gates: Arc::new(Mutex::new(gates.to_vec())),
    };
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("metrics.jsonl");
    let line = |step: usize, loss: f64| {
        format!("{{\"step\":{step},\"images\":64,\"loss\":{loss},\"lr\":0.001}}\n")
    };
    // Two steps more than the checkpoint has.
    let lines: String = (0..12)
        .map(|step| line(step, 10.0 / (step + 1) as f64))
        .collect();
    std::fs::write(&log, lines).unwrap();
    State::new(&about, "learned", &log, [10, 350], Stop::default())
}

fn screen(state: &State, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| state.draw(frame)).unwrap();
    terminal.backend().to_string()
}

#[test]
fn it_fits_terminals_of_any_size() {
    let mut state = state(&[1.0, 0.0, 0.5, 0.5]);
    let begun = Instant::now();
    for done in 11..=110 {
        state.push("loss", 1.0);
        state.reach(done, begun + Duration::from_secs(done as u64));
    }
    for (width, height) in [(120, 40), (80, 24), (50, 14)] {
        let text = screen(&state, width, height);
        for words in [
            "quickstart",
            "stage 2 of 14: learned",
            "gates",
            "██",
            "step 110/350",
            "4m00s left",
            "q stops",
        ] {
            assert!(text.contains(words), "{width} x {height}: {words}\n{text}");
        }
        assert_eq!(text.contains("007"), height >= 18, "{text}");
        assert_eq!(text.contains(" lr "), width >= WIDE, "{text}");
    }
    state.stop.request();
    let text = screen(&state, 80, 24);
    assert!(text.contains("stopping after this step"), "{text}");
    // Terminals too small for any content.
    for (width, height) in [(1, 1), (7, 3), (200, 2), (3, 60)] {
        screen(&state, width, height);
    }
}

#[test]
fn curves_go_on_after_a_resumption_on_an_axis_that_shows_them() {
    let mut state = state(&[]);
    let loss = &state.curves["loss"];
    assert_eq!(
        (loss.len(), loss[0], loss[9]),
        (10, (1.0, 10.0), (10.0, 1.0))
    );
    let scale = Scale::of(loss);
    assert!(scale.logarithmic);
    assert_eq!(scale.labels(), ["1.00", "3.16", "10.0"]);
    assert!(!Scale::of(&[(1.0, 1.0), (2.0, 2.0)]).logarithmic);
    assert!(!Scale::of(&[(1.0, -1.0), (2.0, 100.0)]).logarithmic);
    assert_eq!(Scale::of(&[]).bounds, [0.0, 1.0]);
    state.push("loss", f64::NAN);
    assert_eq!(state.curves["loss"].len(), 10);
    (0..3 * POINTS).for_each(|_| state.push("loss", 1.0));
    assert!(state.curves["loss"].len() <= POINTS);
    assert_eq!(state.order()[0].0, "loss");
    state.choose(-1);
    assert_eq!(state.chosen, 1);
}

#[test]
fn keys_stop_or_choose_and_nothing_else() {
    let key = |code, modifiers| action(KeyEvent::new(code, modifiers));
    let none = KeyModifiers::NONE;
    assert_eq!(key(KeyCode::Char('q'), none), Some(Action::Stop));
    assert_eq!(
        key(KeyCode::Char('c'), KeyModifiers::CONTROL),
        Some(Action::Stop)
    );
    assert_eq!(key(KeyCode::Right, none), Some(Action::Curve(1)));
    for code in "abcdefghijklmnoprstuvwxyz k?".chars().map(KeyCode::Char) {
        assert_eq!(key(code, none), None, "{code:?}");
    }
}

#[test]
fn the_time_left_is_that_of_the_last_minute() {
    let mut state = state(&[]);
    assert_eq!(state.left(), None);
    let begun = Instant::now();
    // Slow at first, then one step per second.
    state.reach(11, begun + Duration::from_secs(500));
    for done in 12..=150 {
        state.reach(done, begun + Duration::from_secs(488 + done as u64));
    }
    let left = state.left().unwrap().as_secs_f64();
    assert!((195.0..205.0).contains(&left), "{left}");
}
