//! Products of bfloat16: factors rounded to 8 bits of precision, sums of f32.
//!
//! A factor of such a product is stored as pairs: two values that meet one after the other in the
//! sum, in the halves of a word of 32 bits, the first in the low one. `vdpbf16ps` (AVX512-BF16)
//! multiplies pairs: on AMD's processors at nearly twice the rate of f32, on some of Intel's at
//! half of it, which [`native::is_slow`] measures. On processors without it [`Pairs`] computes
//! what the instruction does from f32, no faster than products of f32. Only values and sums below
//! 1e-38 differ, which the instruction takes for zero.

use pulp::Simd;

use super::product::Step;

/// `x` rounded to the nearest bfloat16, ties to even, as the high half of a word. What is not a
/// number stays so.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let near = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    if x.is_nan() { 0x7fc0_0000 } else { near }
}

/// The word of two values, the first in its low half.
#[inline(always)]
pub(super) fn pair(first: f32, second: f32) -> f32 {
    f32::from_bits(rounded(first) >> 16 | rounded(second))
}

/// Pairs of the values of one row: `words[i]` of `values[2 i]` and the next, or zero after the
/// last.
#[inline(always)]
pub(super) fn along(values: &[f32], words: &mut [f32]) {
    /// Words written at a time, a vector of AVX-512.
    const WORDS: usize = 16;
    let (chunks, rest) = values.as_chunks::<{ 2 * WORDS }>();
    let (places, others) = words[..values.len().div_ceil(2)].as_chunks_mut::<WORDS>();
    for (values, place) in chunks.iter().zip(&mut *places) {
        let mut halves = [0u16; 2 * WORDS];
        for (half, value) in halves.iter_mut().zip(values) {
            *half = (rounded(*value) >> 16) as u16; // all of its bits
        }
        for (word, index) in place.iter_mut().zip(0..) {
            let [low, high] = [halves[2 * index], halves[2 * index + 1]].map(u32::from);
            *word = f32::from_bits(low | high << 16);
        }
    }
    let tail = places[chunks.len()..].iter_mut().flatten().chain(others);
    for (values, word) in rest.chunks(2).zip(tail) {
        *word = pair(values[0], values.get(1).copied().unwrap_or(0.0));
    }
}

/// Pairs of two rows: `words[i]` of `first[i]` and `second[i]`, or zero where there is no second.
#[inline(always)]
pub(super) fn across(first: &[f32], second: Option<&[f32]>, words: &mut [f32]) {
    match second {
        Some(second) => super::simd::write(
            words,
            [first, second],
            #[inline(always)]
            |[first, second]| pair(first, second),
        ),
        None => super::simd::write(
            words,
            [first],
            #[inline(always)]
            |[first]| pair(first, 0.0),
        ),
    }
}

/// Products of pairs in f32. The second value of each pair is added first, as the instruction does.
#[derive(Clone, Copy)]
pub(super) struct Pairs;

impl Step for Pairs {
    #[inline(always)]
    fn add<S: Simd>(simd: S, x: S::f32s, row: S::f32s, sum: S::f32s) -> S::f32s {
        let (half, high) = (simd.splat_u32s(16), simd.splat_u32s(0xffff_0000));
        let [[x, y], [v, w]] = [x, row].map(
            #[inline(always)]
            |words| {
                let words = simd.transmute_u32s_f32s(words);
                [
                    simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(words, half)),
                    simd.transmute_f32s_u32s(simd.and_u32s(words, high)),
                ]
            },
        );
        simd.mul_add_e_f32s(x, v, simd.mul_add_e_f32s(y, w, sum))
    }
}

/// The instruction.
#[cfg(target_arch = "x86_64")]
pub(super) mod native {
    use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps};
    use std::hint::black_box;
    use std::time::{Duration, Instant};

    use pulp::{Simd, WithSimd, x86::V4};

    use super::super::product::{Block, Single, Step, Tiles};

    /// Products of pairs by `vdpbf16ps`; vectors are those of [`V4`].
    #[derive(Clone, Copy)]
    struct Instruction;

    /// Sixteen words of a register.
    #[repr(C)]
    union Words<T: Copy> {
        any: T,
        values: __m512,
        pairs: __m512bh,
    }

    impl Step for Instruction {
        #[inline(always)]
        fn add<S: Simd>(_: S, x: S::f32s, row: S::f32s, sum: S::f32s) -> S::f32s {
            const { assert!(size_of::<S::f32s>() == size_of::<__m512>()) };
            // SAFETY: `tiles` alone takes these steps, with the vectors of `V4`, which are a
            // register as all fields are, and only where the processor has the instruction.
            unsafe {
                let [x, row, sum] = [x, row, sum].map(|any| Words { any });
                let values = _mm512_dpbf16_ps(sum.values, x.pairs, row.pairs);
                Words { values }.any
            }
        }
    }

    /// The vectors of a processor that has the instruction.
    #[inline]
    pub(in super::super) fn vectors() -> Option<V4> {
        is_x86_feature_detected!("avx512bf16")
            .then(V4::try_new)
            .flatten()
    }

    /// See [`Block::multiply`].
    #[target_feature(
        enable = "avx512bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt,fxsr"
    )]
    unsafe fn tiles<const TURNED: bool>(simd: V4, block: Block<'_, TURNED>) {
        // SAFETY: guaranteed by the caller.
        unsafe { Tiles::<Instruction, TURNED>::of(block) }.with_simd(simd);
    }

    /// Computes a block of pairs.
    ///
    /// # Safety
    ///
    /// As for [`Block::multiply`].
    #[inline(always)]
    pub(in super::super) unsafe fn multiply<const TURNED: bool>(
        simd: V4,
        block: Block<'_, TURNED>,
    ) {
        // SAFETY: `simd` comes from `vectors`, so the processor has the instructions.
        unsafe { tiles(simd, block) }
    }

    /// Whether the processor has the instruction, and multiplies pairs by it no faster than it
    /// multiplies their values of f32. (A Xeon of Intel's Emerald Rapids starts one in two cycles,
    /// where it starts four steps of f32.)
    pub(in super::super) fn is_slow() -> bool {
        vectors().is_some_and(|simd| {
            // What else the machine does can only lengthen a time.
            let [f32, pairs] = [time::<Single>, time::<Instruction>].map(|time| {
                // SAFETY: `vectors` says that the processor has the instructions.
                (0..16).map(|_| unsafe { time(simd) }).min()
            });
            pairs >= f32.map(|time| 2 * time)
        })
    }

    /// The time of some thousand steps that need not wait for each other, with registers alone.
    #[target_feature(
        enable = "avx512bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt,fxsr"
    )]
    unsafe fn time<K: Step>(simd: V4) -> Duration {
        let mut sums = [simd.splat_f32s(0.0); 16];
        let begun = Instant::now();
        for _ in 0..1024 {
            // Anew each time, or the compiler would multiply once.
            let x = black_box(simd.splat_f32s(1.0));
            for sum in &mut sums {
                *sum = K::add(simd, x, x, *sum);
            }
        }
        black_box(sums);
        begun.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, WithSimd};

    use super::super::panels::{PanelView, panel_width};
    use super::super::product::{Block, STRIDE, Start, Tiles};
    use super::*;
    use crate::backend::Compute;
    use crate::random::{self, Stream};

    #[test]
    fn values_are_rounded_to_the_nearest_ties_to_even() {
        let cases = [
            (1.0, 1.0),
            (1.003_906_3, 1.0),         // 1 + 2^-8 lies between 1 and 1 + 2^-7
            (1.011_718_8, 1.015_625),   // 1 + 3 2^-8, between odd and even
            (1.003_906_4, 1.007_812_5), // just above the middle
            (-1.003_906_4, -1.007_812_5),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
            (-0.0, -0.0),
        ];
        for (x, expected) in cases {
            let found = f32::from_bits(rounded(x));
            assert_eq!(found.to_bits(), f32::to_bits(expected), "{x}: {found}");
        }
        for x in [f32::NAN, -f32::NAN, f32::from_bits(0x7fff_ffff)] {
            assert!(f32::from_bits(rounded(x)).is_nan());
        }
        let values = random::normal(0, Stream::Bench, 11, 0, 1000);
        for x in values {
            let theirs = half::bf16::from_f32(x).to_f32();
            assert_eq!(f32::from_bits(rounded(x)), theirs);
        }
    }

    #[test]
    fn pairs_hold_all_values_of_a_row_of_any_length() {
        for count in (0..70).chain([255, 256]) {
            let values = random::normal(0, Stream::Bench, 11, 0, count);
            let mut words = vec![f32::NAN; count.div_ceil(2)];
            along(&values, &mut words);
            for (index, word) in words.iter().enumerate() {
                let second = values.get(2 * index + 1).copied().unwrap_or(0.0);
                assert_eq!(word.to_bits(), pair(values[2 * index], second).to_bits());
            }
            let mut both = vec![f32::NAN; count];
            across(&values, Some(&values), &mut both);
            let mut one = vec![f32::NAN; count];
            across(&values, None, &mut one);
            for ((value, both), one) in values.iter().zip(both).zip(one) {
                assert_eq!(both.to_bits(), pair(*value, *value).to_bits());
                assert_eq!(one.to_bits(), rounded(*value) >> 16);
            }
        }
    }

    /// Tiles by [`Pairs`], in this machine's vectors.
    struct ByPairs<'a, const TURNED: bool>(Block<'a, TURNED>);

    impl<const TURNED: bool> WithSimd for ByPairs<'_, TURNED> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            // SAFETY: the block's sizes are those of its memory.
            simd.vectorize(unsafe { Tiles::<Pairs, TURNED>::of(self.0) });
        }
    }

    fn gives_the_bits_of_its_definition<const TURNED: bool>() {
        let (rows, deep, columns) = (14, 90, 2 * panel_width());
        let words = |index: u64, count: usize| -> Vec<f32> {
            let values = random::normal(0, Stream::Bench, 12, index, 2 * count);
            values.chunks(2).map(|v| pair(v[0], v[1])).collect()
        };
        let (a, b) = (words(0, deep * STRIDE), words(1, deep * columns));
        let panels = PanelView {
            start: b.as_ptr(),
            depth: deep,
            values: 2 * deep,
            columns,
            compute: Compute::Bf16,
        };
        let block = |c: &mut [f32]| Block::<TURNED> {
            rows,
            deep,
            scratch: a.as_ptr(),
            panels,
            from: 0,
            columns: 0..columns,
            c: c.as_mut_ptr(),
            stride: columns,
            start: Start::Sum,
            ahead: None,
        };
        let start = random::normal(0, Stream::Bench, 12, 2, rows * columns);
        let halves =
            |word: f32| [word.to_bits() << 16, word.to_bits() & 0xffff_0000].map(f32::from_bits);
        let width = panel_width();
        let mut expected = start.clone();
        for (index, sum) in expected.iter_mut().enumerate() {
            let (row, column) = (index / columns, index % columns);
            for p in 0..deep {
                let place = match TURNED {
                    true => p * STRIDE + row,
                    false => row * STRIDE + p,
                };
                let [x, y] = halves(a[place]);
                let place = column / width * width * deep + p * width + column % width;
                let [v, w] = halves(b[place]);
                // Products of two values of 8 bits are exact: it does not matter whether they are
                // rounded before they are added.
                *sum = x.mul_add(v, y.mul_add(w, *sum));
            }
        }
        let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|v| v.to_bits()).collect() };
        let mut found = start.clone();
        Arch::new().dispatch(ByPairs(block(&mut found)));
        assert_eq!(bits(&found), bits(&expected));
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = native::vectors() {
            let mut found = start.clone();
            // SAFETY: the block's sizes are those of its memory.
            unsafe { native::multiply(simd, block(&mut found)) };
            assert_eq!(bits(&found), bits(&expected));
        }
    }

    #[test]
    fn the_instruction_and_its_emulation_give_the_same_bits() {
        gives_the_bits_of_its_definition::<false>();
        gives_the_bits_of_its_definition::<true>();
    }
}
