use tinyfusion::models::Prunable;
use tinyfusion::ops::TrainingBackend;
use tinyfusion::process::GaussianDiffusion;
use tinyfusion::pruning::{Score, ScoreBatch, keep_by_scores, score};
use tinyfusion::state::collect;

use crate::compare::Rule;
use crate::fixture::{Group, config, network, usize_of, usizes_of};

pub fn prune_scores<B: TrainingBackend>(slack: f64) {
    let group = Group::open("prune_scores");
    let case = &group.case;
    let rule = Rule::new(case, slack);
    let file = group.file("scores.safetensors");
    let config = config(&case["config"]);
    let process = GaussianDiffusion::full();
    let network = network::<B::InnerBackend>(&config, &group.state("weights.safetensors"));
    let batches = usize_of(&case["num_batches"]);
    let named = [
        ("bi", Score::Shortgpt, "t_bi"),
        ("flux", Score::FluxLite, "t_bi"),
        ("sensitivity", Score::Sensitivity, "t"),
    ];
    for (name, method, t) in named {
        let mut means = vec![0.0; config.depth];
        for index in 0..batches {
            let row = |key: &str| file.get(key).row(index);
            let batch = ScoreBatch {
                x: row("x").tensor(),
                noise: row("noise").tensor(),
                y: row("y").labels(),
                t: row(t).times(),
                known: None,
            };
            let calibration = score(&network, &process, method, &batch);
            let by_batch = match calibration.base {
                Some(base) => {
                    rule.check(
                        &file.name,
                        "loss_base",
                        &[base],
                        &file.get("loss_base").row(index).scalar(),
                    );
                    let skipped: Vec<f64> = calibration
                        .scores
                        .iter()
                        .map(|score| score + base)
                        .collect();
                    rule.check(&file.name, "loss_skip", &skipped, &row("loss_skip"));
                    calibration.scores
                }
                None => {
                    rule.check(
                        &file.name,
                        &format!("{name}_batches"),
                        &calibration.scores,
                        &row(&format!("{name}_batches")),
                    );
                    calibration.scores
                }
            };
            means
                .iter_mut()
                .zip(by_batch)
                .for_each(|(mean, score)| *mean += score / batches as f64);
        }
        rule.check(&file.name, name, &means, file.get(name));

        let least_important_first = usizes_of(&case["least_important_first"][name]);
        for keep in 1..config.depth {
            // The order is by score; BI never removes the last layer.
            let mut removed: Vec<usize> = least_important_first
                .iter()
                .copied()
                .filter(|&layer| method != Score::Shortgpt || layer + 1 < config.depth)
                .take(config.depth - keep)
                .collect();
            removed.sort_unstable();
            let expected: Vec<usize> = (0..config.depth)
                .filter(|layer| !removed.contains(layer))
                .collect();
            assert_eq!(
                keep_by_scores(method, &means, keep),
                expected,
                "{name}, {keep} kept"
            );
        }
        if method == Score::Shortgpt {
            for removal in case["bi_removals"].as_array().unwrap() {
                let keep = config.depth - usize_of(&removal["n_pruned"]);
                assert_eq!(
                    keep_by_scores(method, &means, keep),
                    usizes_of(&removal["kept"])
                );
            }
        }
    }

    let by_index = &case["by_index"];
    let argument: Vec<usize> =
        serde_json::from_str(by_index["argument"].as_str().unwrap()).unwrap();
    let pruned = network.keep(&argument);
    assert_eq!(pruned.trunk().depth, usizes_of(&by_index["kept"]).len());
    assert_eq!(
        collect::<B::InnerBackend, _>(&pruned),
        group.state(by_index["file"].as_str().unwrap())
    );
}
