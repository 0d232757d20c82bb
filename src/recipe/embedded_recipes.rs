//! The repository's recipes, embedded in the program, so that the binary alone runs them by name.

/// Name and text of each recipe.
pub const RECIPES: [(&str, &str); 38] = [
    ("d14_1_2", include_str!("../../recipes/d14_1_2.toml")),
    ("d14_2_4", include_str!("../../recipes/d14_2_4.toml")),
    ("d14_7_14", include_str!("../../recipes/d14_7_14.toml")),
    (
        "d14_finetune",
        include_str!("../../recipes/d14_finetune.toml"),
    ),
    ("d14_kd", include_str!("../../recipes/d14_kd.toml")),
    (
        "d14_masked_kd",
        include_str!("../../recipes/d14_masked_kd.toml"),
    ),
    ("d14_oracle", include_str!("../../recipes/d14_oracle.toml")),
    ("d16_hybrid", include_str!("../../recipes/d16_hybrid.toml")),
    ("d19", include_str!("../../recipes/d19.toml")),
    ("d7_1_4", include_str!("../../recipes/d7_1_4.toml")),
    (
        "d7_iterative",
        include_str!("../../recipes/d7_iterative.toml"),
    ),
    (
        "ddpm_bedroom",
        include_str!("../../recipes/ddpm_bedroom.toml"),
    ),
    (
        "ddpm_celebahq",
        include_str!("../../recipes/ddpm_celebahq.toml"),
    ),
    (
        "ddpm_church",
        include_str!("../../recipes/ddpm_church.toml"),
    ),
    (
        "ddpm_cifar10",
        include_str!("../../recipes/ddpm_cifar10.toml"),
    ),
    (
        "digits_features",
        include_str!("../../recipes/digits_features.toml"),
    ),
    ("digits_mar", include_str!("../../recipes/digits_mar.toml")),
    ("digits_sit", include_str!("../../recipes/digits_sit.toml")),
    (
        "digits_teacher",
        include_str!("../../recipes/digits_teacher.toml"),
    ),
    (
        "fashion_curves",
        include_str!("../../recipes/fashion_curves.toml"),
    ),
    (
        "fashion_depth_or_width",
        include_str!("../../recipes/fashion_depth_or_width.toml"),
    ),
    (
        "fashion_features",
        include_str!("../../recipes/fashion_features.toml"),
    ),
    (
        "fashion_gates",
        include_str!("../../recipes/fashion_gates.toml"),
    ),
    (
        "fashion_inside",
        include_str!("../../recipes/fashion_inside.toml"),
    ),
    (
        "fashion_masks",
        include_str!("../../recipes/fashion_masks.toml"),
    ),
    (
        "fashion_paper",
        include_str!("../../recipes/fashion_paper.toml"),
    ),
    (
        "fashion_settings",
        include_str!("../../recipes/fashion_settings.toml"),
    ),
    (
        "fashion_teacher",
        include_str!("../../recipes/fashion_teacher.toml"),
    ),
    (
        "fashion_unet",
        include_str!("../../recipes/fashion_unet.toml"),
    ),
    (
        "fashion_unet_teacher",
        include_str!("../../recipes/fashion_unet_teacher.toml"),
    ),
    (
        "fashion_ways",
        include_str!("../../recipes/fashion_ways.toml"),
    ),
    (
        "fashion_width_kd",
        include_str!("../../recipes/fashion_width_kd.toml"),
    ),
    ("mar_d16", include_str!("../../recipes/mar_d16.toml")),
    ("quickstart", include_str!("../../recipes/quickstart.toml")),
    ("sit_d14", include_str!("../../recipes/sit_d14.toml")),
    ("standin", include_str!("../../recipes/standin.toml")),
    ("width_50", include_str!("../../recipes/width_50.toml")),
    ("width_75", include_str!("../../recipes/width_75.toml")),
];

/// The text of an embedded recipe.
pub fn recipe(name: &str) -> Option<&'static str> {
    let found = RECIPES.iter().find(|(known, _)| *known == name);
    found.map(|(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_recipes_of_the_repository_are_there() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|ending| ending == "toml"))
            .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        names.sort();
        assert!(names.iter().eq(RECIPES.iter().map(|(name, _)| name)));
        assert!(recipe("quickstart").is_some() && recipe("no such").is_none());
    }
}
