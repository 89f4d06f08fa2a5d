//! Page and plot of a sweep: one row per run, its bits per byte as a dot on a logarithmic axis.

use std::fmt::Write;

use serde_json::Value;

use super::html::{duration, escape, grouped, percent, short};
use super::page::document;

/// The page, from the object that `table.json` holds. Runs are named by the keys that differ.
pub fn page(sweep: &Value) -> String {
    let runs = sweep["runs"].as_array().map_or(&[][..], Vec::as_slice);
    let description = sweep["description"].as_str().unwrap_or_default();
    let title = if description.is_empty() { "Sweep" } else { description };
    let keys = differing(runs);
    let names: Vec<String> = runs.iter().map(|run| name(run, &keys)).collect();
    let dots: Vec<Dot> =
        runs.iter().zip(&names).map(|(run, name)| Dot::new(run, name.clone())).collect();
    let has_names = runs.iter().any(|run| run["given"].is_string());
    let mut heads: Vec<String> = Vec::new();
    if has_names || keys.is_empty() {
        heads.push("run".to_string());
    }
    heads.extend(keys.iter().cloned());
    let measures = ["bits per byte", "loss, nats per token", "verbatim windows", "files exact"];
    heads.extend(measures.map(String::from));
    heads.extend(["parameters", "steps", "training time"].map(String::from));
    let head = row("th", &heads);
    let bits = |run: &Value| run["bits_per_byte"].as_f64();
    let best = runs.iter().filter_map(bits).reduce(f64::min);
    let mut rows = String::new();
    for (run, dot) in runs.iter().zip(&dots) {
        let mut cells = Vec::new();
        if has_names || keys.is_empty() {
            cells.push(run["given"].as_str().unwrap_or(&dot.name).to_string());
        }
        cells.extend(keys.iter().map(|key| text(&settings(run)[key])));
        let number = |name: &str| run[name].as_f64();
        let count = |name: &str| run[name].as_u64().map(grouped).unwrap_or_default();
        cells.push(number("bits_per_byte").map(short).unwrap_or_default());
        cells.push(number("loss").map(short).unwrap_or_default());
        cells.push(dot.verbatim.map(percent).unwrap_or_default());
        let exact = run["files_exact"].as_u64().zip(run["files"].as_u64());
        cells.push(exact.map_or_else(String::new, |(exact, all)| {
            format!("{} of {}", grouped(exact), grouped(all))
        }));
        cells.extend([count("parameters"), count("steps")]);
        cells.push(number("seconds").map(duration).unwrap_or_default());
        let cells = row("td", &cells);
        let class = if bits(run).is_some() && bits(run) == best { " class=\"best\"" } else { "" };
        let _ = writeln!(rows, "<tr{class}>{cells}</tr>");
    }
    let body = format!(
        "<header>\n<h1>{}</h1>\n<p>A sweep of {} runs. The names show the settings that differ among \
         them; the run with the fewest bits per byte is in bold.</p>\n</header>\n\
         <section id=\"plot\">\n<h2>Bits per byte</h2>\n<div class=\"plot\">{}</div>\n</section>\n\
         <section id=\"runs\">\n<h2>Runs</h2>\n<div class=\"plot\"><table class=\"sweep\">\n\
         <tr>{head}</tr>\n{rows}</table></div>\n</section>\n",
        escape(title),
        runs.len(),
        plot("", &dots),
    );
    document(&format!("laam: {title}"), &body, "")
}

/// Cells of a row of a table.
fn row(tag: &str, cells: &[String]) -> String {
    cells.iter().fold(String::new(), |mut row, cell| {
        let _ = write!(row, "<{tag}>{}</{tag}>", escape(cell));
        row
    })
}

/// The settings of a run that differ from the recipe's, or from another run's.
fn settings(run: &Value) -> &Value {
    if run["differs"].is_object() { &run["differs"] } else { &run["changed"] }
}

/// Keys whose values are not the same in all runs.
fn differing(runs: &[Value]) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    for run in runs {
        for key in settings(run).as_object().into_iter().flatten().map(|(key, _)| key) {
            let is_new = !keys.contains(key);
            if is_new && runs.iter().any(|other| settings(other)[key] != settings(run)[key]) {
                keys.push(key.clone());
            }
        }
    }
    keys
}

/// Name of a run among the others: its given name, and the settings that differ.
pub fn name(run: &Value, keys: &[String]) -> String {
    let given = run["given"].as_str().map(String::from);
    let differing = keys.iter().map(|key| format!("{key}={}", text(&settings(run)[key])));
    let parts: Vec<String> = given.into_iter().chain(differing).collect();
    if parts.is_empty() {
        return run["name"].as_str().unwrap_or_default().to_string();
    }
    parts.join(" ")
}

/// The plot by itself, from the object that `table.json` holds.
pub fn plot_of(sweep: &Value) -> String {
    let runs = sweep["runs"].as_array().map_or(&[][..], Vec::as_slice);
    let keys = differing(runs);
    let dots: Vec<Dot> = runs.iter().map(|run| Dot::new(run, name(run, &keys))).collect();
    plot(sweep["description"].as_str().unwrap_or_default(), &dots)
}

/// A setting as a recipe has it, without quotes.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// One run of the plot.
pub struct Dot {
    /// Name of the run.
    pub name: String,
    /// Bits per byte of the text.
    pub bits_per_byte: f64,
    /// Rate of verbatim windows.
    pub verbatim: Option<f64>,
}

impl Dot {
    fn new(run: &Value, name: String) -> Self {
        let exact = run["windows_exact"].as_f64();
        let share = exact.zip(run["windows"].as_f64()).map(|(exact, all)| exact / all);
        Self {
            name,
            bits_per_byte: run["bits_per_byte"].as_f64().unwrap_or(f64::NAN),
            verbatim: share.or(run["verbatim_rate"].as_f64()),
        }
    }
}

const ROW: f64 = 18.0;
/// Width of a character of the names, which are set in a font of 12 units.
const CHARACTER: f64 = 6.6;
/// Width of the dots' column, and of the one right of it.
const DOTS: f64 = 310.0;
const VERBATIM: f64 = 90.0;

/// A file of its own, on white.
pub fn plot(title: &str, dots: &[Dot]) -> String {
    let longest = dots.iter().map(|dot| shortened(&dot.name).chars().count()).max().unwrap_or(0);
    // Right ends of the names and of the dots.
    let left = (CHARACTER * longest as f64 + 20.0).max(120.0);
    let right = left + DOTS;
    let width = right + VERBATIM;
    let drawn = |dot: &&Dot| dot.bits_per_byte > 1e-12 && dot.bits_per_byte < 1e12;
    let logs = dots.iter().filter(drawn).map(|dot| dot.bits_per_byte.log10());
    let least = logs.clone().fold(f64::INFINITY, f64::min).floor();
    let (from, to) = if least.is_finite() {
        (least, logs.fold(f64::NEG_INFINITY, f64::max).ceil().max(least + 1.0))
    } else {
        (0.0, 1.0)
    };
    let x = |value: f64| left + (value.log10() - from) / (to - from) * DOTS;
    let height = 58.0 + ROW * dots.len() as f64 + 24.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         font-family=\"system-ui, DejaVu Sans, sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{}</text>\n\
         <text x=\"{left}\" y=\"42\" fill=\"#555\">bits per byte</text>\n\
         <text x=\"{}\" y=\"42\" fill=\"#555\">verbatim</text>\n",
        escape(title),
        right + 20.0
    );
    let bottom = 52.0 + ROW * dots.len() as f64;
    for power in from as i32..=to as i32 {
        let at = x(10f64.powi(power));
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"50\" y2=\"{bottom}\" stroke=\"#ddd\"/>\n\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">{}</text>",
            bottom + 16.0,
            short(10f64.powi(power))
        );
    }
    for (row, dot) in dots.iter().enumerate() {
        let y = 52.0 + ROW * (row as f64 + 0.5);
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 10.0,
            y + 4.0,
            escape(&shortened(&dot.name))
        );
        if drawn(&dot) {
            let _ = writeln!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"#1f6feb\"><title>{}</title></circle>",
                x(dot.bits_per_byte),
                short(dot.bits_per_byte)
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{:.1}\">{}</text>",
            right + 20.0,
            y + 4.0,
            dot.verbatim.map(percent).unwrap_or_default()
        );
    }
    svg + "</svg>\n"
}

/// A name that is far too long, without its middle: the ends tell more.
fn shortened(name: &str) -> String {
    const MAX_NAME_CHARS: usize = 120;
    let count = name.chars().count();
    if count <= MAX_NAME_CHARS {
        return name.to_string();
    }
    let end = name.chars().skip(count - MAX_NAME_CHARS / 2);
    name.chars().take(MAX_NAME_CHARS / 2 - 1).chain(['…']).chain(end).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweep_plot_places_every_run() {
        let dot =
            |bits_per_byte| Dot { name: "<a>".to_string(), bits_per_byte, verbatim: Some(0.5) };
        let svg = plot("a & b", &[dot(0.1), dot(1.0), dot(0.01), dot(f64::NAN)]);
        assert!(svg.contains("a &amp; b") && !svg.contains("<a>"));
        let at: Vec<&str> =
            svg.split("cx=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert_eq!(at, ["275.0", "430.0", "120.0"]);
        assert_eq!(svg.matches("50%").count(), 4);
        assert!(plot("", &[]).ends_with("</svg>\n"));
    }

    #[test]
    fn sweep_page_names_runs_by_what_differs() {
        let run = |rate: f64, bits: f64| {
            serde_json::json!({
                "name": format!("a,rate={rate}"), "changed": {"rate": rate}, "given": "<i>",
                "differs": {"rate": rate, "epochs": 3}, "bits_per_byte": bits, "windows": 4,
                "windows_exact": 1, "files": 2, "files_exact": 1, "seconds": 75.0
            })
        };
        let sweep =
            serde_json::json!({"description": "a & b", "runs": [run(0.1, 2.0), run(0.2, 1.0)]});
        let html = page(&sweep);
        assert!(html.contains("<th>rate</th>") && !html.contains("epochs"), "{html}");
        assert!(html.contains("a &amp; b") && !html.contains("<i>"));
        assert!(html.contains(">&lt;i&gt; rate=0.2</text>"), "{html}");
        let best = html.split("class=\"best\"").nth(1).unwrap();
        assert!(best.contains("<td>0.2</td>") && best.contains("1 of 2") && best.contains("25%"));
        assert_eq!(html.matches("<circle").count(), 2);
        assert!(plot_of(&sweep).contains("rate=0.1"));
    }
}
