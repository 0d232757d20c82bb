use tinyfusion::process::{DiffusionTables, GaussianDiffusion, respace};

use crate::compare::Rule;
use crate::fixture::{Group, usize_of};

#[test]
fn diffusion_schedule() {
    let group = Group::open("diffusion_schedule");
    let rule = Rule::new(&group.case, 1.0);
    let file = group.file("tables.safetensors");
    for case in group.case["cases"].as_array().unwrap() {
        let index = usize_of(&case["index"]);
        let spacing = case["timestep_respacing"].as_str().unwrap();
        let diffusion = GaussianDiffusion::new(spacing).unwrap();
        assert_eq!(
            diffusion.steps(),
            usize_of(&case["num_timesteps"]),
            "{spacing}"
        );
        assert_eq!(
            diffusion.timestep_map,
            file.get(&format!("{index}.timestep_map")).indices(),
            "{spacing}"
        );
        let DiffusionTables {
            betas,
            alphas_cumprod,
            alphas_cumprod_prev,
            alphas_cumprod_next,
            sqrt_alphas_cumprod,
            sqrt_one_minus_alphas_cumprod,
            log_one_minus_alphas_cumprod,
            sqrt_recip_alphas_cumprod,
            sqrt_recipm1_alphas_cumprod,
            posterior_variance,
            posterior_log_variance_clipped,
            posterior_mean_coef1,
            posterior_mean_coef2,
            ..
        } = &diffusion.tables;
        let tables = [
            ("betas", betas),
            ("alphas_cumprod", alphas_cumprod),
            ("alphas_cumprod_prev", alphas_cumprod_prev),
            ("alphas_cumprod_next", alphas_cumprod_next),
            ("sqrt_alphas_cumprod", sqrt_alphas_cumprod),
            (
                "sqrt_one_minus_alphas_cumprod",
                sqrt_one_minus_alphas_cumprod,
            ),
            ("log_one_minus_alphas_cumprod", log_one_minus_alphas_cumprod),
            ("sqrt_recip_alphas_cumprod", sqrt_recip_alphas_cumprod),
            ("sqrt_recipm1_alphas_cumprod", sqrt_recipm1_alphas_cumprod),
            ("posterior_variance", posterior_variance),
            (
                "posterior_log_variance_clipped",
                posterior_log_variance_clipped,
            ),
            ("posterior_mean_coef1", posterior_mean_coef1),
            ("posterior_mean_coef2", posterior_mean_coef2),
        ];
        for (name, table) in tables {
            let key = format!("{index}.{name}");
            rule.check("tables.safetensors", &key, table, file.get(&key));
        }
    }
    for spacing in group.case["invalid_respacings"].as_array().unwrap() {
        assert!(
            respace(spacing.as_str().unwrap()).is_err(),
            "{spacing} must be refused"
        );
    }
}
