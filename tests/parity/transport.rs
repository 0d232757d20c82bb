use std::cell::Cell;

use burn::tensor::{Tensor, backend::Backend};
use serde_json::Value;
use tinyfusion::process::Interpolant;
use tinyfusion::process::interpolant::{Path, Predicts, Weighting};
use tinyfusion::process::transport::{DiffusionForm, LastStep, Ode, Sde, SdeMethod};

use crate::compare::{Largest, values};
use crate::fixture::{Group, Values, f64_of, usize_of};

fn path(name: &str) -> Path {
    match name {
        "Linear" => Path::Linear,
        "GVP" => Path::Gvp,
        "VP" => Path::Vp,
        other => panic!("no path is called {other}"),
    }
}

fn predicts(name: &str) -> Predicts {
    match name {
        "velocity" => Predicts::Velocity,
        "noise" => Predicts::Noise,
        "score" => Predicts::Score,
        other => panic!("nothing called {other} is predicted"),
    }
}

fn form(name: &str) -> DiffusionForm {
    match name {
        "constant" => DiffusionForm::Constant,
        "SBDM" => DiffusionForm::Sbdm,
        "sigma" => DiffusionForm::Sigma,
        "linear" => DiffusionForm::Linear,
        "decreasing" => DiffusionForm::Decreasing,
        "inccreasing-decreasing" => DiffusionForm::IncreasingDecreasing,
        other => panic!("no diffusion is called {other}"),
    }
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap()
}

fn interpolant(case: &Value) -> Interpolant {
    Interpolant::new(
        path(text(case, "path")),
        predicts(text(case, "prediction")),
        Weighting::None,
        None,
        None,
    )
}

/// The fixture's network, a formula.
struct Formula<B: Backend> {
    matrix: Tensor<B, 2>,
    rows: [Tensor<B, 4>; 3],
    s: f64,
}

impl<B: Backend> Formula<B> {
    fn new(group: &Group) -> Self {
        let file = group.file("model.safetensors");
        let row = |name: &str| {
            let row: Tensor<B, 1> = file.get(name).tensor();
            let channels = row.dims()[0];
            row.reshape([1, channels, 1, 1])
        };
        Self {
            matrix: file.get("A").tensor(),
            rows: ["Bc", "Cc", "m"].map(row),
            s: f64_of(&group.case["config"]["s"]),
        }
    }

    fn predict(&self, predicts: Predicts, x: Tensor<B, 4>, t: f32) -> Tensor<B, 4> {
        match predicts {
            Predicts::Velocity => self.velocity(x, t),
            Predicts::Score => self.score(x, t),
            Predicts::Noise => self.score(x, t) * (t - 1.0),
        }
    }

    fn velocity(&self, x: Tensor<B, 4>, t: f32) -> Tensor<B, 4> {
        let [batch, channels, height, width] = x.dims();
        let [of_time, constant, _] = &self.rows;
        let mixed = self
            .matrix
            .clone()
            .unsqueeze::<3>()
            .matmul(x.reshape([batch, channels, height * width]))
            .reshape([batch, channels, height, width]);
        (mixed + of_time.clone() * (2.0 * t).cos() + constant.clone()).tanh()
    }

    fn score(&self, x: Tensor<B, 4>, t: f32) -> Tensor<B, 4> {
        let spread = f64::from(t * t) * self.s * self.s + f64::from(1.0 - t).powi(2);
        let centre = self.rows[2].clone() * t;
        (centre - x.clone()) / spread + self.velocity(x, t) * (0.1 * t)
    }
}

pub fn sit_paths<B: Backend>(slack: f64) {
    let group = Group::open("sit_transport");
    let file = group.file("paths.safetensors");
    let rule = Largest {
        tolerance: slack * f64_of(&group.case["tolerance"]["paths"]),
    };
    let t = file.get("t").times();
    let norm = f64_of(&group.case["config"]["norm"]);
    let tensor = |key: &str| file.get(key).tensor::<B, 4>();
    let device = B::Device::default();
    for name in ["Linear", "GVP", "VP"] {
        let of = |key: &str| format!("{name}.{key}");
        let interpolant =
            Interpolant::new(path(name), Predicts::Velocity, Weighting::None, None, None);
        let host = |key: &str, value: &dyn Fn(f64) -> f64| {
            let values: Vec<f32> = t.iter().map(|t| value(f64::from(*t)) as f32).collect();
            let values = Tensor::<B, 1>::from_floats(values.as_slice(), &device);
            rule.tensor(&of(key), values, file.get(&of(key)));
        };
        let mix = |t: f64| interpolant.path.at(t);
        host("alpha", &|t| mix(t).alpha);
        host("d_alpha", &|t| mix(t).alpha_rate);
        host("sigma", &|t| mix(t).sigma);
        host("d_sigma", &|t| mix(t).sigma_rate);
        host("d_alpha_over_alpha", &|t| mix(t).log_rate);
        host("drift_var", &|t| interpolant.path.drift_variance(t));
        let forms: Vec<String> = (file.names())
            .filter_map(|key| Some(key.strip_prefix(&of("diffusion."))?.to_owned()))
            .collect();
        assert!(!forms.is_empty());
        for named in forms {
            host(&format!("diffusion.{named}"), &|t| {
                form(&named).at(&interpolant, norm, t)
            });
        }
        let check = |key: &str, actual| rule.tensor(&of(key), actual, file.get(&of(key)));
        let (x0, x1, v) = (|| tensor("x0"), || tensor("x1"), || tensor("v"));
        check("xt", interpolant.state(x1(), x0(), &t));
        check("ut", interpolant.path_velocity(x1(), x0(), &t));
        let still = interpolant.velocity_of_score(x0().zeros_like(), x0(), &t);
        check("drift_mean", still.neg());
        check(
            "score_from_velocity",
            interpolant.score_of_velocity(v(), x0(), &t),
        );
        check(
            "noise_from_velocity",
            interpolant.noise_of_velocity(v(), x0(), &t),
        );
        check(
            "velocity_from_score",
            interpolant.velocity_of_score(v(), x0(), &t),
        );
    }
}

pub fn sit_losses<B: Backend>(slack: f64) {
    let group = Group::open("sit_transport");
    let file = group.file("training_losses.safetensors");
    let rule = Largest {
        tolerance: slack * f64_of(&group.case["tolerance"]["training_losses"]),
    };
    let (t, uniform) = (file.get("t").times(), file.get("u").times());
    let formula = Formula::<B>::new(&group);
    let tensor = |key: &str| file.get(key).tensor::<B, 4>();
    let names: Vec<&str> = file.names().filter(|key| key.ends_with(".loss")).collect();
    assert!(!names.is_empty());
    for key in names {
        let parts: Vec<&str> = key.split('.').collect();
        let weighting = match parts[2] {
            "None" => Weighting::None,
            "velocity" => Weighting::Velocity,
            "likelihood" => Weighting::Likelihood,
            other => panic!("no weighting is called {other}"),
        };
        let interpolant =
            Interpolant::new(path(parts[0]), predicts(parts[1]), weighting, None, None);
        let of = |what: &str| format!("{}.{}.{what}", parts[0], parts[1]);
        let (first, last) = interpolant.train_interval();
        let time = |u: &f32| (f64::from(*u) * (last - first) + first) as f32;
        let drawn: Vec<f32> = uniform.iter().map(time).collect();
        let drawn = Tensor::<B, 1>::from_floats(drawn.as_slice(), &Default::default());
        rule.tensor(&of("t_from_u"), drawn, file.get(&of("t_from_u")));
        let x = interpolant.state(tensor("x1"), tensor("x0"), &t);
        let rows = t.iter().enumerate().map(|(row, t)| {
            let x = x.clone().narrow(0, row, 1);
            formula.predict(interpolant.predicts, x, *t)
        });
        let output = Tensor::cat(rows.collect(), 0);
        rule.tensor(&of("pred"), output.clone(), file.get(&of("pred")));
        let loss = interpolant.mse(output.clone(), tensor("x1"), tensor("x0"), &t);
        rule.tensor(key, loss.clone(), file.get(key));
        // The distance from the target is the loss.
        let target = match interpolant.predicts {
            Predicts::Velocity => interpolant.path_velocity(tensor("x1"), tensor("x0"), &t),
            Predicts::Noise => tensor("x0"),
            Predicts::Score => {
                let sigma: Vec<f32> = (t.iter())
                    .map(|t| -1.0 / interpolant.path.at(f64::from(*t)).sigma as f32)
                    .collect();
                let sigma = Tensor::<B, 1>::from_floats(sigma.as_slice(), &Default::default());
                tensor("x0") * sigma.reshape([t.len(), 1, 1, 1])
            }
        };
        let distance = interpolant.distance(output, target, &t);
        rule.tensor(key, distance, file.get(key));
    }
}

/// Compares a trajectory with the fixture's, state by state.
fn follow<B: Backend>(
    key: &str,
    expected: &Values,
    tolerance: f64,
) -> impl FnMut(usize, &Tensor<B, 4>) {
    let rule = Largest { tolerance };
    move |k, state| rule.tensor(&format!("{key}[{k}]"), state.clone(), &expected.row(k))
}

pub fn sit_ode<B: Backend>(slack: f64) {
    let group = Group::open("sit_transport");
    let file = group.file("ode.safetensors");
    let formula = Formula::<B>::new(&group);
    let tolerance = |key: &str| slack * f64_of(&group.case["tolerance"][key]);
    for case in group.case["ode_cases"].as_array().unwrap() {
        let interpolant = interpolant(case);
        let (key, steps) = (text(case, "key"), usize_of(&case["num_steps"]));
        let backwards = case["reverse"].as_bool().unwrap();
        let (mut first, mut last) = interpolant.ode_interval();
        if backwards {
            (first, last) = (1.0 - first, 1.0 - last);
        }
        for (time, named) in [(first, "t0"), (last, "t1")] {
            assert!((time - f64_of(&case[named])).abs() < 1e-12, "{key} {named}");
        }
        let calls = Cell::new(0);
        let mut model = |x: Tensor<B, 4>, t: f32| {
            calls.set(calls.get() + 1);
            formula.predict(interpolant.predicts, x, t)
        };
        let init = || file.get("init").tensor::<B, 4>();
        let method = match text(case, "method") {
            "euler" => Ode::Euler,
            "heun2" => Ode::Heun,
            _ => Ode::Dopri5 {
                atol: f64_of(&case["atol"]),
                rtol: f64_of(&case["rtol"]),
            },
        };
        let rule = match method {
            Ode::Dopri5 { .. } => "ode_dopri5",
            _ => "ode_fixed",
        };
        let mut watch = follow::<B>(key, file.get(key), tolerance(rule));
        watch(0, &init());
        let mut seen = 0;
        method.solve(
            &interpolant,
            &mut model,
            init(),
            steps,
            backwards,
            |k, state| {
                seen = k;
                watch(k, state);
            },
        );
        assert_eq!(seen, steps - 1, "{key}");
        let (expected, calls) = (usize_of(&case["model_calls"]), calls.get());
        match method {
            Ode::Dopri5 { .. } => {
                assert_eq!(calls, expected, "{key}");
                let fine = Ode::Dopri5 {
                    atol: 1e-5,
                    rtol: 1e-5,
                };
                let exact = format!("{key}.exact");
                let watch = follow(&exact, file.get(&exact), tolerance("ode_dopri5_exact"));
                fine.solve(&interpolant, &mut model, init(), steps, backwards, watch);
            }
            _ => assert_eq!(calls, expected, "{key}"),
        }
    }
}

pub fn sit_sde<B: Backend>(slack: f64) {
    let group = Group::open("sit_transport");
    let file = group.file("sde.safetensors");
    let formula = Formula::<B>::new(&group);
    let tolerance = slack * f64_of(&group.case["tolerance"]["sde"]);
    for case in group.case["sde_cases"].as_array().unwrap() {
        let interpolant = interpolant(case);
        let (key, steps) = (text(case, "key"), usize_of(&case["num_steps"]));
        let sde = Sde {
            method: match text(case, "method") {
                "Euler" => SdeMethod::Euler,
                _ => SdeMethod::Heun,
            },
            form: form(text(case, "diffusion_form")),
            norm: f64_of(&case["diffusion_norm"]),
            last_step: match case["last_step"].as_str() {
                None => LastStep::None,
                Some("Mean") => LastStep::Mean,
                Some("Tweedie") => LastStep::Tweedie,
                Some("Euler") => LastStep::Euler,
                Some(other) => panic!("no last step is called {other}"),
            },
            last_step_size: f64_of(&case["last_step_size"]),
        };
        let (first, last) = sde.interval(&interpolant);
        for (time, named) in [(first, "t0"), (last, "t1")] {
            assert!((time - f64_of(&case[named])).abs() < 1e-12, "{key} {named}");
        }
        let mut model = |x: Tensor<B, 4>, t: f32| formula.predict(interpolant.predicts, x, t);
        let mut noise = |k: usize| file.get("noise").row(k).tensor();
        let init = file.get("init").tensor();
        let mut follow = follow::<B>(key, file.get(key), tolerance);
        let mut seen = 0;
        let watch = |k: usize, state: &Tensor<B, 4>| {
            seen += 1;
            follow(k, state);
        };
        let last = sde.solve(&interpolant, &mut model, init, steps, &mut noise, watch);
        assert!(values(last).iter().all(|value| value.is_finite()), "{key}");
        assert_eq!(seen, steps, "{key}");
    }
}

#[test]
fn sit_intervals() {
    let group = Group::open("sit_transport");
    for case in group.case["eps_resolution"].as_array().unwrap() {
        let [train, sample] = ["train_eps_in", "sample_eps_in"].map(|key| case[key].as_f64());
        // Given only one of them, the reference overwrites the other's default, or the one itself.
        if train.is_some() != sample.is_some() {
            continue;
        }
        let (path, predicts) = (path(text(case, "path")), predicts(text(case, "prediction")));
        let interpolant = Interpolant::new(path, predicts, Weighting::None, train, sample);
        assert_eq!(interpolant.train_eps, f64_of(&case["train_eps"]), "{case}");
        assert_eq!(
            interpolant.sample_eps,
            f64_of(&case["sample_eps"]),
            "{case}"
        );
    }
    for case in group.case["check_interval"].as_array().unwrap() {
        let [train, sample] = ["train_eps_in", "sample_eps_in"].map(|key| case[key].as_f64());
        let (path, predicts) = (path(text(case, "path")), predicts(text(case, "prediction")));
        let interpolant = Interpolant::new(path, predicts, Weighting::None, train, sample);
        let expect = |key: &str, (first, last): (f64, f64)| {
            for (found, expected) in [(first, &case[key][0]), (last, &case[key][1])] {
                assert!((found - f64_of(expected)).abs() < 1e-12, "{key}: {case}");
            }
        };
        expect("train", interpolant.train_interval());
        let (first, last) = interpolant.ode_interval();
        expect("ode", (first, last));
        expect("ode_reverse", (1.0 - first, 1.0 - last));
        for named in ["SBDM", "sigma"] {
            for size in ["0.0", "0.04"] {
                let sde = Sde {
                    method: SdeMethod::Euler,
                    form: form(named),
                    norm: 1.0,
                    last_step: LastStep::Mean,
                    last_step_size: size.parse().unwrap(),
                };
                let key = format!("sde.{named}.last_step_size={size}");
                expect(&key, sde.interval(&interpolant));
            }
        }
    }
}
