use burn::tensor::Tensor;
use tinyfusion::ops::TrainingBackend;
use tinyfusion::process::{
    Distillation, GaussianDiffusion, MaskedFeatures, Noised, TeacherOutput, typical,
};
use tinyfusion::trunk::Tap;

use crate::compare::{Rule, values};
use crate::fixture::{Group, config, dropped, f64_of, gradients, network, usizes_of};

pub fn distill_losses<B: TrainingBackend>(slack: f64) {
    let group = Group::open("distill_losses");
    let case = &group.case;
    let rule = Rule::new(case, slack);
    let (file, grads) = (
        group.file("io.safetensors"),
        group.file("grads.safetensors"),
    );
    let massive = group.file("massive.safetensors");
    let (student_config, teacher_config) = (
        config(&case["student_config"]),
        config(&case["teacher_config"]),
    );
    let diffusion = GaussianDiffusion::new(case["timestep_respacing"].as_str().unwrap()).unwrap();
    let t = file.get("t").times();
    for case in group.case["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let mut states = [
            group.state("student.safetensors"),
            group.state("teacher.safetensors"),
        ];
        if case["massive"].as_bool() == Some(true) {
            states[0].extend(massive.state("student."));
            states[1].extend(massive.state("teacher."));
        }
        let (student, teacher) = (
            network::<B>(&student_config, &states[0]),
            network::<B::InnerBackend>(&teacher_config, &states[1]),
        );
        let taps: Vec<(usize, usize)> = match case["student_layers"].is_null() {
            true => Vec::new(),
            false => usizes_of(&case["student_layers"])
                .into_iter()
                .zip(usizes_of(&case["teacher_layers"]))
                .collect(),
        };
        let features = (!taps.is_empty()).then(|| {
            let beta = f64_of(&group.case["beta_feat"]);
            MaskedFeatures {
                taps: taps.clone(),
                k: Some(f64_of(&case["k"])),
                beta: (beta, beta),
            }
        });
        let distillation = Distillation {
            alpha: f64_of(&group.case["alpha_kd"]),
            features,
        };

        let y = dropped(file.get("y"), file.get("drop_ids"), student_config.classes);
        let y_teacher = if case["teacher_sees_dropped_labels"].as_bool().unwrap() {
            &y
        } else {
            file.get("y")
        };
        let teacher_layers: Vec<usize> = taps.iter().map(|tap| tap.1).collect();
        let said = Noised::new(
            &diffusion,
            file.get("x").tensor(),
            file.get("noise").tensor(),
            t.clone(),
            y_teacher.labels(),
            None,
        )
        .teach(&diffusion, &teacher, &teacher_layers);
        let said = TeacherOutput {
            output: Tensor::from_inner(said.output),
            features: said.features.into_iter().map(Tensor::from_inner).collect(),
        };

        let seen = Noised::new(
            &diffusion,
            file.get("x").tensor::<B, 4>(),
            file.get("noise").tensor(),
            t.clone(),
            y.labels(),
            None,
        );
        let mut tap = Tap::new(taps.iter().map(|tap| tap.0));
        let output = seen.run(&diffusion, &student, &mut tap);
        let weight = distillation
            .features
            .as_ref()
            .map_or(0.0, |features| features.weight(0, 1));
        let terms = seen.distillation_terms(
            &diffusion,
            output,
            &tap.outputs,
            &said,
            &distillation,
            weight,
        );

        let check = |key: &str, actual: Tensor<B, 1>| {
            let key = format!("{name}.{key}");
            rule.tensor(&file.name, &key, actual, file.get(&key));
        };
        check("mse", terms.get("mse").unwrap().clone());
        check("vb", terms.get("vb").unwrap().clone());
        check(
            "gt",
            terms.get("mse").unwrap().clone() + terms.get("vb").unwrap().clone(),
        );
        check("vb_kd", terms.get("vb_kd").unwrap().clone());
        check(
            "kd_loss",
            terms.get("kd").unwrap().clone() + terms.get("vb_kd").unwrap().clone(),
        );
        check("loss", terms.total.clone());
        if let Some(features) = terms.get("features") {
            check("feat_loss", features.clone());
            let masked = |hidden: &[Tensor<B, 3>]| -> Vec<f64> {
                let k = f64_of(&case["k"]);
                hidden
                    .iter()
                    .flat_map(|x| values((typical(x, k).neg() + 1.0).sum_dim(1).sum_dim(2)))
                    .collect()
            };
            rule.check(
                &file.name,
                &format!("{name}.masked_student"),
                &masked(&tap.outputs),
                file.get(&format!("{name}.masked_student")),
            );
            rule.check(
                &file.name,
                &format!("{name}.masked_teacher"),
                &masked(&said.features),
                file.get(&format!("{name}.masked_teacher")),
            );
        }
        let actual = gradients::<B, _>(&student, &terms.total.mean().backward());
        let expected: Vec<&str> = grads
            .names()
            .filter_map(|key| key.strip_prefix(&format!("{name}.")))
            .collect();
        assert_eq!(
            actual.keys().map(String::as_str).collect::<Vec<_>>(),
            expected,
            "parameters with a gradient"
        );
        for (parameter, gradient) in &actual {
            rule.check(
                &grads.name,
                &format!("{name}.{parameter}"),
                &gradient.data,
                grads.get(&format!("{name}.{parameter}")),
            );
        }
    }
}
