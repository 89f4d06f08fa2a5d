//! Plot of a sweep: one row per run, its bits per byte as a dot on a logarithmic axis.

use std::fmt::Write;

use super::html::{escape, percent, short};

/// One run of the plot.
pub struct Dot {
    pub name: String,
    pub bits_per_byte: f64,
    /// Rate of verbatim windows.
    pub verbatim: Option<f64>,
}

const ROW: f64 = 18.0;
/// Right ends of the names and of the dots.
const LEFT: f64 = 330.0;
const RIGHT: f64 = 640.0;
const WIDTH: f64 = 760.0;

/// A file of its own, on white.
pub fn plot(title: &str, dots: &[Dot]) -> String {
    let drawn = |dot: &&Dot| dot.bits_per_byte > 1e-12 && dot.bits_per_byte < 1e12;
    let logs = dots.iter().filter(drawn).map(|dot| dot.bits_per_byte.log10());
    let least = logs.clone().fold(f64::INFINITY, f64::min).floor();
    let (from, to) = if least.is_finite() {
        (least, logs.fold(f64::NEG_INFINITY, f64::max).ceil().max(least + 1.0))
    } else {
        (0.0, 1.0)
    };
    let x = |value: f64| LEFT + (value.log10() - from) / (to - from) * (RIGHT - LEFT);
    let height = 58.0 + ROW * dots.len() as f64 + 24.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         font-family=\"system-ui, DejaVu Sans, sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{}</text>\n\
         <text x=\"{LEFT}\" y=\"42\" fill=\"#555\">bits per byte</text>\n\
         <text x=\"{}\" y=\"42\" fill=\"#555\">verbatim</text>\n",
        escape(title),
        RIGHT + 20.0
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
            LEFT - 10.0,
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
            RIGHT + 20.0,
            y + 4.0,
            dot.verbatim.map(percent).unwrap_or_default()
        );
    }
    svg + "</svg>\n"
}

/// A name cut to its column.
fn shortened(name: &str) -> String {
    const MAX_NAME_CHARS: usize = 48;
    if name.chars().count() <= MAX_NAME_CHARS {
        return name.to_string();
    }
    name.chars().take(MAX_NAME_CHARS - 1).chain(['…']).collect()
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
        assert_eq!(at, ["485.0", "640.0", "330.0"]);
        assert_eq!(svg.matches("50%").count(), 4);
        assert!(plot("", &[]).ends_with("</svg>\n"));
    }
}
