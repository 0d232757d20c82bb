use burn::tensor::{Int, Tensor};
use tinyfusion::ops::TrainingBackend;
use tinyfusion::process::{GaussianDiffusion, Noised, Variance};

use crate::compare::{Rule, values};
use crate::fixture::{Group, f64_of, usize_of};

const FILE: &str = "steps.safetensors";

pub fn diffusion_steps<B: TrainingBackend>(slack: f64) {
    let group = Group::open("diffusion_steps");
    let rule = Rule::new(&group.case, slack);
    let file = group.file(FILE);
    let etas: Vec<f64> = group.case["ddim_etas"]
        .as_array()
        .unwrap()
        .iter()
        .map(f64_of)
        .collect();
    for case in group.case["cases"].as_array().unwrap() {
        let index = usize_of(&case["index"]);
        let input = |name: &str| file.get(&format!("{index}.{name}"));
        let check = |name: &str, actual: Tensor<B, 4>| {
            let expected = input(name);
            // The reference stores variances expanded to the sample; this crate's broadcast.
            let shape: [usize; 4] = expected.shape.clone().try_into().unwrap();
            rule.tensor(
                FILE,
                &format!("{index}.{name}"),
                actual.expand(shape),
                expected,
            );
        };
        let diffusion =
            GaussianDiffusion::new(case["timestep_respacing"].as_str().unwrap()).unwrap();
        let t = input("t").indices();
        let (x_start, noise, step_noise) = (
            input("x_start").tensor::<B, 4>(),
            input("noise").tensor::<B, 4>(),
            input("step_noise").tensor::<B, 4>(),
        );
        let output = input("model_output").tensor::<B, 4>();
        let channels = x_start.dims()[1];
        rule.check(
            FILE,
            &format!("{index}.model_t"),
            &values(diffusion.model_timesteps::<B>(&t, &x_start.device())),
            input("model_t"),
        );

        let x_t = diffusion.q_sample(x_start.clone(), &t, noise.clone());
        check("q_sample", x_t.clone());
        let (mean, log_variance) = diffusion.q_mean_log_variance(x_start.clone(), &t);
        check("q_mean", mean);
        check("q_variance", log_variance.clone().exp());
        check("q_log_variance", log_variance);
        let (mean, log_variance) = diffusion.q_posterior(x_start.clone(), x_t.clone(), &t);
        check("posterior_mean", mean);
        check("posterior_log_variance", log_variance);
        let posterior_variance: Vec<f32> = t
            .iter()
            .map(|&t| diffusion.tables.posterior_variance[t] as f32)
            .collect();
        let posterior_variance =
            Tensor::<B, 1>::from_floats(posterior_variance.as_slice(), &x_t.device()).reshape([
                t.len(),
                1,
                1,
                1,
            ]);
        check("posterior_variance", posterior_variance.clone());

        for (prefix, clip) in [("noclip", false), ("clip", true)] {
            let prediction = diffusion.predict(output.clone(), x_t.clone(), &t, clip);
            check(&format!("{prefix}.mean"), prediction.mean.clone());
            check(
                &format!("{prefix}.log_variance"),
                prediction.log_variance.clone(),
            );
            check(
                &format!("{prefix}.variance"),
                prediction.log_variance.clone().exp(),
            );
            check(&format!("{prefix}.pred_xstart"), prediction.x_start.clone());
            check(
                &format!("{prefix}.p_sample"),
                diffusion.ddpm_step(prediction.clone(), &t, step_noise.clone()),
            );
            for (j, &eta) in etas.iter().enumerate() {
                check(
                    &format!("{prefix}.ddim_sample.{j}"),
                    diffusion.ddim_step(
                        prediction.clone(),
                        x_t.clone(),
                        &t,
                        eta,
                        step_noise.clone(),
                    ),
                );
            }
        }

        let objective = |output: &Tensor<B, 4>, diffusion: &GaussianDiffusion| {
            let y = Tensor::<B, 1, Int>::zeros([t.len()], &x_start.device());
            Noised {
                clean: x_start.clone(),
                noise: noise.clone(),
                t: t.iter().map(|step| *step as f32).collect(),
                y,
                state: x_t.clone(),
                masked: None,
            }
            .terms(diffusion, output.clone())
        };
        let tracked = output.clone().require_grad();
        let terms = objective(&tracked, &diffusion);
        let row = |name: &str, actual: &Tensor<B, 1>| {
            rule.tensor(
                FILE,
                &format!("{index}.{name}"),
                actual.clone(),
                input(name),
            )
        };
        row("loss.mse", terms.get("mse").unwrap());
        row("loss.vb", terms.get("vb").unwrap());
        row("loss.loss", &terms.total);
        let gradients = terms.total.mean().backward();
        rule.tensor(
            FILE,
            &format!("{index}.loss.grad_model_output"),
            tracked.grad(&gradients).unwrap(),
            input("loss.grad_model_output"),
        );

        let epsilon = output.narrow(1, 0, channels);
        for (prefix, variance) in [
            ("fixed_large", Variance::FixedLarge),
            ("fixed_small", Variance::FixedSmall),
        ] {
            let diffusion = diffusion.clone().with_variance(variance);
            let prediction = diffusion.predict(epsilon.clone(), x_t.clone(), &t, false);
            check(&format!("{prefix}.mean"), prediction.mean);
            check(
                &format!("{prefix}.log_variance"),
                prediction.log_variance.clone(),
            );
            // At t = 0 the posterior's variance is 0, and its clipped logarithm is another
            // number's.
            let table = (variance == Variance::FixedSmall).then(|| posterior_variance.clone());
            check(
                &format!("{prefix}.variance"),
                table.unwrap_or_else(|| prediction.log_variance.exp()),
            );
            row(
                &format!("{prefix}.loss"),
                &objective(&epsilon, &diffusion).total,
            );
        }
    }
}
