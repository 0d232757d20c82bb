use tinyfusion::ops::TrainingBackend;
use tinyfusion::process::{GaussianDiffusion, Guidance, Sampler, Solver};

use crate::compare::{Rule, values};
use crate::fixture::{Group, Values, config, f64_of, network, usize_of, usizes_of};

pub fn dit_sampling<B: TrainingBackend>(slack: f64) {
    let group = Group::open("dit_sampling");
    let case = &group.case;
    let rule = Rule::new(case, slack);
    let file = group.file("samples.safetensors");
    // Inference runs on the inner backend.
    let network = network::<B::InnerBackend>(
        &config(&case["config"]),
        &group.state("weights.safetensors"),
    );
    let diffusion = GaussianDiffusion::new(case["timestep_respacing"].as_str().unwrap()).unwrap();
    assert_eq!(diffusion.timestep_map, usizes_of(&case["timestep_map"]));
    let n = usize_of(&case["n"]);
    for run in case["runs"].as_array().unwrap() {
        let name = run["name"].as_str().unwrap();
        let solver = match run["sampler"].as_str().unwrap() {
            "ddim" => Solver::Ddim {
                eta: f64_of(&run["eta"]),
                clip: false,
            },
            _ => Solver::Ddpm { clip: false },
        };
        let sampler = Sampler {
            process: diffusion.clone().into(),
            steps: diffusion.steps(),
            solver,
            guidance: Guidance {
                scale: f64_of(&run["cfg_scale"]),
                channels: 3,
            },
        };
        let mut noise = |k: usize| file.get("noise").row(k).first(n).tensor();
        let expect = |kind: &str, k: usize, actual: Vec<f64>| {
            let key = format!("{name}.{kind}");
            let row = file.get(&key).row(k).first(n);
            rule.check(&file.name, &key, &actual, &row);
        };
        let last = sampler.denoise(
            &network,
            file.get("z").tensor(),
            file.get("y").labels(),
            &mut noise,
            |k, state, prediction| {
                expect("samples", k, values(state.clone()));
                expect("pred_xstart", k, values(prediction.clone()));
            },
        );
        let key = format!("{name}.final");
        let expected: &Values = file.get(&key);
        rule.tensor(&file.name, &key, last, expected);
    }
}
