//! Functions of one value, written so that the compiler vectorises them inside [`vectorised`].

use std::sync::atomic::{Ordering, compiler_fence};

use pulp::{Arch, Simd, WithSimd};

/// Runs `work` compiled for this machine's best vector instructions (AVX-512, AVX2, NEON), chosen
/// at run time.
///
/// `work` and everything it calls must be `#[inline(always)]`; otherwise they are compiled for the
/// baseline instruction set.
#[inline(always)]
pub(super) fn vectorised(work: impl FnMut()) {
    // pulp's own closures are `FnOnce`: for a closure that can be called again, the compiler
    // inserts a function compiled for the baseline instruction set.
    struct Work<F>(F);
    impl<F: FnMut()> WithSimd for Work<F> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(mut self, _: S) {
            (self.0)();
        }
    }
    Arch::new().dispatch(Work(work));
}

/// Asks for a cache line without waiting for it. The place need not exist.
#[inline(always)]
pub(super) fn prefetch(place: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint: nothing is read, and no address is refused.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(place.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// `e^x` to 2 units in the last place for `x` in [-87.3, 88.3]; outside, the value at the nearer
/// end.
///
/// `2^n e^r` with integer `n` and `|r| <= ln 2 / 2`; the polynomial is Cephes' `expf`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it leaves the nearest integer in the low bits.
    const WHOLE: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, WHOLE);
    let n = shifted - WHOLE;
    // ln 2 in two parts, so that r is exact.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    p = r.mul_add(p, 1.398_2e-3);
    p = r.mul_add(p, 8.333_452e-3);
    p = r.mul_add(p, 4.166_579_6e-2);
    p = r.mul_add(p, 1.666_666_5e-1);
    p = r.mul_add(p, 0.5);
    let e = (r * r).mul_add(p, r) + 1.0;
    // The low bits of `shifted` are n; they are moved into the exponent.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    e * power
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

const TWICE_ROOT_2_OVER_PI: f32 = 1.595_769_121_605_730_8_f64 as f32;
const CUBE: f32 = 0.044715;

/// The error function to 4e-7: `x P(x^2) / Q(x^2)`, fitted to the least largest error within
/// [-4, 4], and never beyond 1, so that a GELU has the sign of its argument or is zero.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let square = x * x;
    let p = [
        -1.366_614_1e-8,
        4.780_408_7e-6,
        3.826_879_3e-4,
        3.839_539_8e-3,
        0.054_332_57,
        0.184_710_95,
        std::f32::consts::FRAC_2_SQRT_PI,
    ];
    let q = [
        6.400_804e-5,
        1.309_575_5e-3,
        0.015_453_522,
        0.113_826_46,
        0.497_029_36,
        1.0,
    ];
    let mut numerator = p[0];
    for coefficient in &p[1..] {
        numerator = square.mul_add(numerator, *coefficient);
    }
    let mut denominator = q[0];
    for coefficient in &q[1..] {
        denominator = square.mul_add(denominator, *coefficient);
    }
    (x * numerator / denominator).clamp(-1.0, 1.0)
}

/// `(1 + erf(x / sqrt(2))) / 2`
#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    erf(x * std::f32::consts::FRAC_1_SQRT_2).mul_add(0.5, 0.5)
}

/// GELU.
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    x * normal_cdf(x)
}

/// Derivative of [`gelu`].
#[inline(always)]
pub(super) fn gelu_derivative(x: f32) -> f32 {
    const ONE_OVER_ROOT_2_PI: f32 = 0.398_942_3;
    (x * ONE_OVER_ROOT_2_PI).mul_add(exp(-0.5 * x * x), normal_cdf(x))
}

/// GELU by its tanh approximation.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    x * sigmoid(gelu_argument(x))
}

#[inline(always)]
fn gelu_argument(x: f32) -> f32 {
    (x * x).mul_add(CUBE * TWICE_ROOT_2_OVER_PI, TWICE_ROOT_2_OVER_PI) * x
}

/// Derivative of [`gelu_tanh`].
#[inline(always)]
pub(super) fn gelu_tanh_derivative(x: f32) -> f32 {
    let s = sigmoid(gelu_argument(x));
    let slope = (x * x).mul_add(3.0 * CUBE * TWICE_ROOT_2_OVER_PI, TWICE_ROOT_2_OVER_PI);
    (x * s * (1.0 - s)).mul_add(slope, s)
}

/// `x / (1 + e^-x)`
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// Derivative of [`silu`].
#[inline(always)]
pub(super) fn silu_derivative(x: f32) -> f32 {
    let s = sigmoid(x);
    (x * s).mul_add(1.0 - s, s)
}

/// Values processed at a time: one vector of AVX-512, several of narrower instruction sets.
pub(super) const LINE: usize = 16;

/// `out[i] = f(a[i], b[i], ..)` over rows of equal length.
#[inline(always)]
pub(super) fn write<const N: usize>(
    out: &mut [f32],
    inputs: [&[f32]; N],
    f: impl Fn([f32; N]) -> f32,
) {
    by_line::<N, false>(
        out,
        inputs,
        #[inline(always)]
        |_, values| f(values),
    );
}

/// `out[i] = f(out[i], [a[i], b[i], ..])` over rows of equal length.
#[inline(always)]
pub(super) fn update<const N: usize>(
    out: &mut [f32],
    inputs: [&[f32]; N],
    f: impl Fn(f32, [f32; N]) -> f32,
) {
    by_line::<N, true>(out, inputs, f);
}

/// [`update`] if `READ`, else [`write`].
///
/// A whole line is read before any of its results is written. Otherwise the compiler, which can't
/// tell the rows apart, would move one value at a time, or check for overlap in every call, which
/// costs more than a short row itself.
#[inline(always)]
fn by_line<const N: usize, const READ: bool>(
    out: &mut [f32],
    inputs: [&[f32]; N],
    f: impl Fn(f32, [f32; N]) -> f32,
) {
    let length = out.len();
    let mut lines: [&[[f32; LINE]]; N] = [&[]; N];
    let mut rests: [&[f32]; N] = [&[]; N];
    for n in 0..N {
        (lines[n], rests[n]) = inputs[n][..length].as_chunks::<LINE>();
    }
    let (out, rest) = out.as_chunks_mut::<LINE>();
    for (index, out) in out.iter_mut().enumerate() {
        let mut values = [[0.0; LINE]; N];
        for n in 0..N {
            values[n] = lines[n][index];
        }
        let mut line = if READ { *out } else { [0.0; LINE] };
        for lane in 0..LINE {
            let mut at = [0.0; N];
            for n in 0..N {
                at[n] = values[n][lane];
            }
            line[lane] = f(line[lane], at);
        }
        *out = line;
        // Emits no instruction. It keeps the compiler from vectorising over sixteen lines at once,
        // with a gather and a scatter for each value.
        compiler_fence(Ordering::SeqCst);
    }
    for (index, out) in rest.iter_mut().enumerate() {
        let mut at = [0.0; N];
        for n in 0..N {
            at[n] = rests[n][index];
        }
        *out = f(if READ { *out } else { 0.0 }, at);
    }
}

/// Copies a row to the start of `out`. The library's function costs more per call than a short row.
#[inline(always)]
pub(super) fn copy(values: &[f32], out: &mut [f32]) {
    write(
        &mut out[..values.len()],
        [values],
        #[inline(always)]
        |[value]| value,
    );
}

/// The sum of `f` over two rows, in sixteen running sums.
#[inline(always)]
pub(super) fn sum2(a: &[f32], b: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LINE];
    let (mut a, mut b) = (a.chunks_exact(LINE), b.chunks_exact(LINE));
    for (a, b) in (&mut a).zip(&mut b) {
        for lane in 0..LINE {
            sums[lane] = f(sums[lane], a[lane], b[lane]);
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a.remainder()).zip(b.remainder()) {
        *sum = f(*sum, *a, *b);
    }
    fold(sums, |a, b| a + b)
}

/// Sums sixteen values pairwise.
#[inline(always)]
pub(super) fn fold(mut values: [f32; LINE], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = 8;
    while width > 0 {
        for lane in 0..width {
            values[lane] = f(values[lane], values[lane + width]);
        }
        width /= 2;
    }
    values[0]
}

/// The sum of `f` over a row.
#[inline(always)]
pub(super) fn sum(a: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    sum2(a, a, |sum, a, _| f(sum, a))
}

/// The dot product of two rows.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum2(a, b, |sum, a, b| a.mul_add(b, sum))
}

/// The dot products of several rows with one, whose sums do not wait for each other.
#[inline(always)]
pub(super) fn dots<const N: usize>(rows: [&[f32]; N], other: &[f32]) -> [f32; N] {
    let mut sums = [[0.0f32; LINE]; N];
    let (lines, rest) = other.as_chunks::<LINE>();
    let whole = lines.len() * LINE;
    let of_rows = rows.map(|row| row[..whole].as_chunks::<LINE>().0);
    for (index, line) in lines.iter().enumerate() {
        for n in 0..N {
            let row = &of_rows[n][index];
            for lane in 0..LINE {
                sums[n][lane] = row[lane].mul_add(line[lane], sums[n][lane]);
            }
        }
    }
    for n in 0..N {
        let values = rows[n][whole..].iter().zip(rest);
        for (sum, (a, b)) in sums[n].iter_mut().zip(values) {
            *sum = a.mul_add(*b, *sum);
        }
    }
    sums.map(|sums| fold(sums, |a, b| a + b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_within_two_units_in_the_last_place() {
        // Every 97th float of the range, both signs: 23 million values.
        let values: Vec<f32> = (0..=0x42b0_999a_u32) // 88.3
            .step_by(97)
            .flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
            .filter(|x| *x >= -87.3)
            .collect();
        let mut got = vec![0.0; values.len()];
        vectorised(
            #[inline(always)]
            || {
                for (got, x) in got.iter_mut().zip(&values) {
                    *got = exp(*x);
                }
            },
        );
        let mut worst = (0.0f64, 0.0);
        for (x, got) in values.iter().zip(got) {
            let exact = f64::from(*x).exp();
            let unit =
                f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            let off = (f64::from(got) - exact).abs() / unit;
            if off > worst.0 {
                worst = (off, f64::from(*x));
            }
        }
        assert!(worst.0 <= 2.0, "{} units at {}", worst.0, worst.1);
    }

    #[test]
    fn the_error_function_is_its_integral() {
        // By Simpson's rule in f64, from 0 to 5 and from there to its limit.
        let steps = 5 * 256;
        let at = |step: f64| (-(step / 256.0).powi(2)).exp();
        let mut exact = 0.0;
        for step in 0..=steps {
            let x = step as f32 / 256.0; // exact
            for x in [x, -x] {
                let expected = exact * f64::from(x.signum());
                let off = (f64::from(erf(x)) - expected).abs();
                assert!(off < 4e-7, "{x}: {}, {expected}", erf(x));
            }
            let from = f64::from(step);
            let simpson = (at(from) + 4.0 * at(from + 0.5) + at(from + 1.0)) / 6.0 / 256.0;
            exact += simpson * 2.0 / std::f64::consts::PI.sqrt();
        }
        for x in [6.0, 10.0, 1e4, 3e38] {
            assert!(
                gelu(x) == x && gelu(-x) == 0.0,
                "{x}: {}, {}",
                gelu(x),
                gelu(-x)
            );
        }
    }

    #[test]
    fn derivatives_are_those_of_their_functions() {
        for step in -200..=200 {
            let x = f64::from(step) / 20.0;
            let check = |f: fn(f32) -> f32, derivative: fn(f32) -> f32| {
                let h = 1.0 / 64.0; // exact in f32
                let slope = f64::from(f(x as f32 + h)) - f64::from(f(x as f32 - h));
                let slope = slope / f64::from(2.0 * h);
                // Truncation h^2/6 f''' < 1e-4, and rounding of values below 10.
                let off = (slope - f64::from(derivative(x as f32))).abs();
                assert!(off < 2e-4, "{x}: {slope}, {}", derivative(x as f32));
            };
            check(gelu, gelu_derivative);
            check(gelu_tanh, gelu_tanh_derivative);
            check(silu, silu_derivative);
        }
    }
}
