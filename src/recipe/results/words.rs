//! The verdict in words: the best of the smaller models, beside the largest and the next best.

use super::Scored;
use crate::report::{Grid, rounded};

/// The row of the lowest FID among those of models.
pub(super) fn best_row(grid: &Grid) -> Option<usize> {
    let column = |title: &str| grid.titles.iter().position(|known| known == title);
    // Real pictures have no parameters.
    let fid = column("FID")?;
    // As the table of a sweep calls them, or that of a run.
    let parameters = column("params").or_else(|| column("parameters"))?;
    let of_models = grid
        .rows
        .iter()
        .enumerate()
        .filter(|(_, row)| row[parameters] != "-");
    // Of a mean and its deviation, the mean.
    let value = |cell: &str| cell.split(' ').next()?.parse::<f64>().ok();
    let scored = of_models.filter_map(|(index, row)| Some((index, value(&row[fid])?)));
    scored
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(index, _)| index)
}

/// The best of the models that compute less, or of all where none does, beside the largest and the
/// next best.
pub(super) fn verdict(models: &[Scored]) -> Option<String> {
    let largest = models
        .iter()
        .reduce(|a, b| if b.macs > a.macs { b } else { a })?;
    let mut ranked: Vec<&Scored> = (models.iter())
        .filter(|model| model.macs < largest.macs)
        .collect();
    let smaller = !ranked.is_empty();
    if !smaller {
        ranked = models.iter().collect();
    }
    ranked.sort_by(|a, b| a.fid.total_cmp(&b.fid));
    let best = ranked.first()?;
    let mut text = format!("{}: FID {}", best.name, rounded(best.fid));
    let depths = best.depth.zip(largest.depth).filter(|(a, b)| a != b);
    if let Some((depth, _)) = depths {
        text += &format!(" with {depth} layers");
    }
    if smaller {
        let pace = best.speed.zip(largest.speed);
        let pace = pace.map_or_else(
            || "beside".to_owned(),
            |(fast, slow)| format!("{} times as fast as", rounded(fast / slow)),
        );
        let fid = rounded(largest.fid);
        text += &format!(", {pace} {}, which has {fid}", largest.name);
        if let Some((_, depth)) = depths {
            text += &format!(" with {depth}");
        }
    }
    text += ".";
    if let Some(next) = ranked.iter().find(|model| model.name != best.name) {
        text += &format!(" Next best: {}, {}.", next.name, rounded(next.fid));
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_the_smaller_models_comes_first() {
        let scored = |name: &str, depth: Option<usize>, macs: f64, fid: f64| Scored {
            name: name.into(),
            depth,
            macs,
            fid,
            speed: Some(600.0 / macs),
            images: 0,
        };
        let teacher = scored("teacher", Some(28), 60.0, 20.0);
        let said = |models: &[&Scored]| {
            let models: Vec<Scored> = models.iter().map(|model| (*model).clone()).collect();
            verdict(&models).unwrap()
        };
        let (a, b) = (
            scored("a", Some(14), 30.0, 40.0),
            scored("b", Some(14), 30.0, 30.0),
        );
        assert_eq!(
            said(&[&teacher, &a, &b]),
            "b: FID 30.0 with 14 layers, 2.00 times as fast as teacher, which has 20.0 with 28. Next best: a, 40.0."
        );
        // As deep, but narrower; and a network without layers.
        let narrow = scored("narrow", Some(28), 30.0, 40.0);
        assert_eq!(
            said(&[&teacher, &narrow]),
            "narrow: FID 40.0, 2.00 times as fast as teacher, which has 20.0."
        );
        let unet = scored("unet", None, 30.0, 40.0);
        assert_eq!(
            said(&[&teacher, &unet]),
            "unet: FID 40.0, 2.00 times as fast as teacher, which has 20.0."
        );
        assert_eq!(said(&[&a, &b]), "b: FID 30.0. Next best: a, 40.0.");
        assert!(verdict(&[]).is_none());
    }

    #[test]
    fn the_best_row_is_that_of_a_model() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let mut grid = Grid {
            titles: row(["model", "params", "FID"]),
            rows: vec![
                row(["real", "-", "1.00 ± 0.00"]),
                row(["a", "2M", "30.00 ± 4.00"]),
                row(["b", "1M", "9.00 ± 1.00"]),
            ],
            best: None,
        };
        assert_eq!(best_row(&grid), Some(2));
        grid.titles[1] = "parameters".into();
        assert_eq!(best_row(&grid), Some(2));
        grid.rows.truncate(1);
        assert_eq!(best_row(&grid), None);
    }
}
