//! What has changed from one resolved recipe to another, in words.

use toml::{Table, Value};

/// Most changes that are named.
const MOST: usize = 4;

/// The keys that differ, with both values, such as "`lr` of stage `learned` was 0.001 and is
/// 0.002"; empty where one of the texts is no recipe.
pub(super) fn changes(before: &str, now: &str) -> Vec<String> {
    let read = |text: &str| text.parse::<Table>().ok();
    let (Some(before), Some(now)) = (read(before), read(now)) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    tables(&before, &now, "", &mut found);
    if found.len() > MOST {
        let others = found.len() - MOST;
        found.truncate(MOST);
        found.push(format!("{others} more"));
    }
    found
}

/// Differences of tables, which are those `of` something.
fn tables(before: &Table, now: &Table, of: &str, found: &mut Vec<String>) {
    let new = now.keys().filter(|key| !before.contains_key(*key));
    for key in before.keys().chain(new) {
        match (before.get(key), now.get(key)) {
            (before, now) if before == now => (),
            (Some(Value::Table(before)), Some(Value::Table(now))) => {
                tables(before, now, &format!(" of {key}{of}"), found);
            }
            (Some(Value::Array(before)), Some(Value::Array(now))) if key == "stage" => {
                stages(before, now, found);
            }
            (before, now) => found.push(format!(
                "`{key}`{of} was {} and is {}",
                shown(before),
                shown(now)
            )),
        }
    }
}

/// Differences of stages at the same places.
fn stages(before: &[Value], now: &[Value], found: &mut Vec<String>) {
    if before.len() != now.len() {
        found.push(format!(
            "there were {} stages and are {}",
            before.len(),
            now.len()
        ));
    }
    for (before, now) in before.iter().zip(now) {
        if let (Value::Table(before), Value::Table(now)) = (before, now) {
            let name = before.get("name").and_then(Value::as_str);
            let of = format!(" of stage `{}`", name.unwrap_or("?"));
            tables(before, now, &of, found);
        }
    }
}

fn shown(value: Option<&Value>) -> String {
    match value {
        None => "absent".into(),
        Some(Value::Table(_)) => "a table".into(),
        Some(value) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::changes;

    #[test]
    fn changes_are_told_by_key_and_value() {
        let recipe = "seed = 0\ndata = 'digits'\n[[stage]]\nname = 'a'\nlr = 0.001\n[stage.architecture]\nwidth = 64\n";
        assert_eq!(changes(recipe, recipe), Vec::<String>::new());
        let now = recipe
            .replace("seed = 0", "seed = 1")
            .replace("0.001", "0.002");
        assert_eq!(
            changes(recipe, &now),
            [
                "`seed` was 0 and is 1",
                "`lr` of stage `a` was 0.001 and is 0.002"
            ]
        );
        let now = recipe
            .replace("data = 'digits'\n", "")
            .replace("64", "96\nheads = 4");
        assert_eq!(
            changes(recipe, &now),
            [
                "`data` was \"digits\" and is absent",
                "`width` of architecture of stage `a` was 64 and is 96",
                "`heads` of architecture of stage `a` was absent and is 4"
            ]
        );
        let longer = format!("{recipe}[[stage]]\nname = 'b'\n");
        assert_eq!(changes(recipe, &longer), ["there were 1 stages and are 2"]);
        let many: String = (0..6).map(|index| format!("k{index} = 1\n")).collect();
        assert_eq!(changes("", &many).last().unwrap(), "2 more");
        assert!(changes("x", recipe).is_empty());
    }
}
