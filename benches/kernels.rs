//! How much sooner do the kernels of CubeCL compute an operator than the reference, which is
//! composed of Burn's operators?
//!
//! `cargo bench --no-default-features --features wgpu --bench kernels` (or `cuda`) prints the
//! medians of both, in turns, forward and backward, for a block of DiT-S/2 and 4 samples of 256
//! tokens, and fails where all kernels together take longer. `-- 32 1152 16` takes as many samples,
//! and the width and heads of another model. On Mesa's software Vulkan it compares passes over a
//! processor's memory; of a graphics card that says little.

#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod measured {
    use std::time::Instant;

    use burn::tensor::backend::Backend;
    use burn::tensor::{Distribution, Tensor};
    use tinyfusion::backend::Compute;
    use tinyfusion::evaluation::median;
    use tinyfusion::ops::{
        Activation, AdamWState, AdamWStep, FusedOps, GroupNormOptions, reference,
    };

    const TOKENS: usize = 256;
    const ROUNDS: usize = 11;
    const EPSILON: f64 = 1e-6;

    type Run<'a> = Box<dyn Fn() + 'a>;

    /// A line of the table: an operator, by its kernels and by the reference.
    struct Line<'a> {
        name: &'static str,
        kernels: Run<'a>,
        reference: Run<'a>,
    }

    fn noise<B: Backend, const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Default::default())
    }

    /// A line whose two ways differ in nothing but the functions.
    macro_rules! line {
        ($name:literal, $kernels:expr, $reference:expr, $($argument:expr),+ $(,)?) => {
            Line {
                name: $name,
                kernels: Box::new(move || drop($kernels($($argument.clone()),+))),
                reference: Box::new(move || drop($reference($($argument.clone()),+))),
            }
        };
    }

    fn seconds<B: Backend>(run: &Run, device: &B::Device) -> f64 {
        B::sync(device).expect("the device answers");
        let begun = Instant::now();
        run();
        B::sync(device).expect("the device answers");
        begun.elapsed().as_secs_f64()
    }

    pub fn measure<B: FusedOps>([batch, width, heads]: [usize; 3]) {
        let device = Default::default();
        let multiple = B::head_multiple();
        let [x, y, gradient] = [(); 3].map(|()| noise::<B, 3>([batch, TOKENS, width]));
        let (x, y, gradient) = (&x, &y, &gradient);
        let modulation = noise::<B, 2>([batch, 6 * width]);
        let part = |index: usize| modulation.clone().narrow(1, index * width, width);
        let (shift, scale, gate) = (&part(0), &part(1), &part(2));
        let hidden = &noise::<B, 2>([batch * TOKENS, 4 * width]);
        let of_hidden = &noise::<B, 2>([batch * TOKENS, 4 * width]);
        let qkv = &noise::<B, 3>([batch, TOKENS, 3 * width]);
        let share = &noise::<B, 1>([batch]);
        let [value, first, second] =
            &[(); 3].map(|()| noise::<B, 2>([4 * width, width]).powi_scalar(2));
        let planes = &noise::<B, 4>([batch, 128, 32, 32]);
        let [of_channel, to_channel] = &[(); 2].map(|()| noise::<B, 1>([128]));

        let gelu = &Activation::GeluTanh;
        let f32 = &Compute::F32;
        let step = &AdamWStep {
            gradient_scale: 1.0,
            lr: 1e-3,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.0,
            time: 2,
        };
        let norm = &GroupNormOptions {
            groups: 32,
            epsilon: 1e-5,
            activation: Activation::Silu,
        };
        let state = &AdamWState {
            value: value.clone(),
            first: first.clone(),
            second: second.clone(),
        };
        let (heads, multiple, epsilon) = (&heads, &multiple, &EPSILON);
        let lines = [
            line!(
                "modulated norm",
                B::modulated_norm,
                reference::modulated_norm,
                x,
                shift,
                scale,
                epsilon
            ),
            line!(
                "modulated norm, backward",
                B::modulated_norm_backward,
                reference::modulated_norm_backward,
                gradient,
                x,
                scale,
                epsilon,
                Some(y.clone()),
            ),
            line!(
                "attention",
                B::qkv_attention,
                |qkv, heads, f32| reference::qkv_attention(qkv, heads, *multiple, f32),
                qkv,
                heads,
                f32,
            ),
            line!(
                "attention, backward",
                B::qkv_attention_backward,
                |gradient, qkv, heads, f32| {
                    reference::qkv_attention_backward(gradient, qkv, heads, *multiple, f32)
                },
                gradient,
                qkv,
                heads,
                f32,
            ),
            line!("GELU", B::activate, reference::activate, hidden, gelu),
            line!(
                "GELU, backward",
                B::activate_backward,
                |gradient, x, gelu| gradient * reference::activate_derivative(x, gelu),
                of_hidden,
                hidden,
                gelu,
            ),
            line!(
                "gated residual",
                B::gated_residual,
                reference::gated_residual,
                x,
                gate,
                y
            ),
            line!(
                "gated residual, backward",
                B::gated_residual_backward,
                reference::gated_residual_backward,
                gradient,
                gate,
                y,
            ),
            line!("blend", B::blend, reference::blend, x, y, share),
            line!(
                "blend, backward",
                B::blend_backward,
                reference::blend_backward,
                gradient,
                x,
                y,
                share
            ),
            line!("AdamW", B::adamw, reference::adamw, state, value, step),
            line!(
                "moving average",
                |a, v| B::moving_average(a, v, 0.99),
                |a, v| reference::moving_average(a, v, 0.99),
                first,
                value,
            ),
            line!(
                "sum of squares",
                B::sum_of_squares,
                |x: Tensor<B, 2>| (x.clone() * x).sum(),
                value,
            ),
            line!(
                "group norm of 128 channels of 32 x 32",
                B::group_norm,
                reference::group_norm,
                planes,
                of_channel,
                to_channel,
                norm,
            ),
        ];
        let mut sums = [0.0; 2];
        println!(
            "| operator | kernels, ms | reference, ms | times as fast |\n|---|---:|---:|---:|"
        );
        for Line {
            name,
            kernels,
            reference,
        } in lines
        {
            let [mut fused, mut composed] = [const { Vec::new() }; 2];
            for round in 0..=ROUNDS {
                let pair = [&kernels, &reference].map(|run| seconds::<B>(run, &device));
                // The first round compiles.
                if round > 0 {
                    fused.push(pair[0]);
                    composed.push(pair[1]);
                }
            }
            let pair = [fused, composed].map(|times| median(&times));
            let [fused, composed] = pair.map(|time| 1e3 * time);
            println!(
                "| {name} | {fused:.2} | {composed:.2} | {:.2} |",
                composed / fused
            );
            sums[0] += fused;
            sums[1] += composed;
        }
        let [fused, composed] = sums;
        println!(
            "| all | {fused:.2} | {composed:.2} | {:.2} |",
            composed / fused
        );
        assert!(
            fused < composed,
            "the kernels take longer than what they take the place of"
        );
    }
}

fn main() {
    let given: Vec<usize> = (std::env::args().skip(1))
        .filter_map(|argument| argument.parse().ok())
        .collect();
    let sizes = match given[..] {
        [batch, width, heads] => [batch, width, heads],
        _ => [4, 384, 6],
    };
    println!(
        "{} samples, width {}, {} heads",
        sizes[0], sizes[1], sizes[2]
    );
    #[cfg(feature = "wgpu")]
    measured::measure::<tinyfusion::backend::Wgpu>(sizes);
    #[cfg(feature = "cuda")]
    measured::measure::<tinyfusion::backend::Cuda>(sizes);
    #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
    println!("these kernels are of the features `wgpu` and `cuda`");
}
