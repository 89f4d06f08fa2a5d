//! Charts as inline SVG: lines over an axis of numbers, and bars over one of names.

use std::fmt::Write;

use super::html::{data, escape, short};

/// Size of the viewBox, in its units; on a phone one is about a pixel.
const WIDTH: f64 = 400.0;
const HEIGHT: f64 = 232.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 36.0;

/// Points per line: more could not be told apart.
const MAX_LINE_POINTS: usize = 400;

/// Points beyond these are left out.
const MAX_PLOTTED: f64 = 1e300;
const MIN_PLOTTED_LOG: f64 = 1e-300;

/// Number format of an axis and its tooltip.
pub type NumberFormat = fn(f64) -> String;

/// A line and its name.
pub struct Series {
    pub name: String,
    /// x ascending.
    pub points: Vec<(f64, f64)>,
}

/// Lines over numbers.
pub struct Lines {
    /// Name of the x axis, as in `step 120`.
    pub x: &'static str,
    /// Unit of the y axis.
    pub y: &'static str,
    pub series: Vec<Series>,
    /// A logarithmic y axis: points of 0 or less are left out.
    pub log: bool,
    /// The y axis has at least this range.
    pub include: Option<(f64, f64)>,
    pub format: NumberFormat,
}

/// Bars side by side over names, one color per series.
pub struct Bars {
    /// Names of the axes.
    pub x: String,
    pub y: &'static str,
    pub names: Vec<String>,
    pub series: Vec<(String, Vec<Option<f64>>)>,
    /// The y axis reaches at least this.
    pub top: f64,
    pub format: NumberFormat,
}

/// Scale of an axis, and its ticks.
struct Axis {
    from: f64,
    to: f64,
    log: bool,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, log: bool, include: Option<(f64, f64)>) -> Self {
        let included = include.map(|(from, to)| [from, to]).into_iter().flatten();
        let (mut from, mut to) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.chain(included) {
            (from, to) = (from.min(value), to.max(value));
        }
        if from > to {
            (from, to) = (1.0, 1.0);
        }
        if from == to {
            // One value lies in the middle.
            let room = if log { 0.5 * from } else { 0.5 * from.abs().max(1.0) };
            (from, to) = (from - room, to + room);
        }
        if log {
            // To 1, 2 or 5 times a power of ten: within a decade too there are ticks.
            let (low, high) = (round_125(from, false), round_125(to, true));
            (from, to) = (low, if high > low { high } else { 10.0 * low });
        }
        Self { from, to, log }
    }

    /// Position along the axis, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.log { value.log10() } else { value };
        (scale(value) - scale(self.from)) / (scale(self.to) - scale(self.from))
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let (low, high) = (self.from.log10().floor() as i32, self.to.log10().ceil() as i32);
            let decades = (self.to / self.from).log10();
            let every = ((high - low) / 5 + 1) as usize;
            let multiples: &[f64] = if decades <= 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
            let within =
                |tick: &f64| (self.from * (1.0 - 1e-9)..=self.to * (1.0 + 1e-9)).contains(tick);
            return (low..=high)
                .step_by(every)
                .flat_map(|power| multiples.iter().map(move |times| times * 10f64.powi(power)))
                .filter(within)
                .collect();
        }
        // 1, 2 or 5 times a power of ten, four of them or so.
        let raw = (self.to - self.from) / 4.0;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|times| times * power);
        let step = step.into_iter().find(|step| *step >= raw * 0.8).unwrap_or(10.0 * power);
        let first = (self.from / step).ceil() as i64;
        let last = (self.to / step + 1e-9).floor() as i64;
        (first..=last).take(20).map(|at| at as f64 * step).collect()
    }
}

/// The next 1, 2 or 5 times a power of ten, at or above a value, or at or below it.
fn round_125(value: f64, up: bool) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|times| times * power);
    let found = if up {
        steps.into_iter().find(|step| *step >= value * (1.0 - 1e-9))
    } else {
        steps.into_iter().rev().find(|step| *step <= value * (1.0 + 1e-9))
    };
    found.unwrap_or(value)
}

fn x_of(axis: &Axis, value: f64) -> f64 {
    LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)
}

fn y_of(axis: &Axis, value: f64) -> f64 {
    HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)
}

/// The opening tag, the names of the axes, and the ticks of the y axis.
fn frame(svg: &mut String, title: &str, names: (&str, &str), y: &Axis, format: NumberFormat) {
    let _ = write!(
        svg,
        "<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\
         <text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
         <text class=\"tick\" x=\"4\" y=\"11\">{}</text>",
        escape(title),
        WIDTH - RIGHT,
        HEIGHT - 5.0,
        escape(names.0),
        escape(names.1)
    );
    for tick in y.ticks() {
        let at = y_of(y, tick);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            escape(&format(tick))
        );
    }
}

fn legend<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    if names.len() < 2 {
        return String::new();
    }
    let mut text = String::from("<p class=\"legend\">");
    for (at, name) in names.enumerate() {
        let _ = write!(text, "<span class=\"key s{at}\">{}</span> ", escape(name));
    }
    text + "</p>"
}

/// A figure around a chart.
fn figure(title: &str, note: &str, body: &str) -> String {
    format!(
        "<figure><figcaption><b>{}</b> <span>{}</span></figcaption>{body}</figure>\n",
        escape(title),
        escape(note)
    )
}

impl Lines {
    /// The figure; empty without points. `note` stands beside the title.
    pub fn figure(mut self, title: &str, note: &str) -> String {
        for series in &mut self.series {
            let drawn = |&(x, y): &(f64, f64)| {
                x.abs() < MAX_PLOTTED && y.abs() < MAX_PLOTTED && (!self.log || y > MIN_PLOTTED_LOG)
            };
            series.points.retain(drawn);
            series.points = thinned(&series.points);
        }
        let all = || self.series.iter().flat_map(|series| series.points.iter());
        if all().next().is_none() {
            return String::new();
        }
        let x = Axis::new(all().map(|point| point.0), false, Some((0.0, 0.0)));
        let y = Axis::new(all().map(|point| point.1), self.log, self.include);
        let mut svg = String::new();
        frame(&mut svg, title, (self.x, self.y), &y, self.format);
        for tick in x.ticks() {
            // Half of a name in the middle of the right edge would be outside.
            let anchor = if x.place(tick) > 0.95 { "end" } else { "middle" };
            let _ = write!(
                svg,
                "<text class=\"tick\" x=\"{:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>",
                x_of(&x, tick),
                HEIGHT - BOTTOM + 14.0,
                short(tick)
            );
        }
        // Tooltips: x and y on the page, and text.
        let mut marks: Vec<(f64, f64, String)> = Vec::new();
        for (at, series) in self.series.iter().enumerate() {
            let mut line = String::new();
            for &(px, py) in &series.points {
                let place = (x_of(&x, px), y_of(&y, py));
                let _ = write!(line, "{:.1},{:.1} ", place.0, place.1);
                let name = if self.series.len() > 1 {
                    format!("{}, ", series.name)
                } else {
                    String::new()
                };
                let words = format!("{name}{} {}: {}", self.x, short(px), (self.format)(py));
                marks.push((
                    (place.0 * 10.0).round() / 10.0,
                    (place.1 * 10.0).round() / 10.0,
                    words,
                ));
            }
            let line = line.trim_end();
            if series.points.len() == 1 {
                let (cx, cy) = (marks[marks.len() - 1].0, marks[marks.len() - 1].1);
                let _ = write!(svg, "<circle class=\"s{at}\" cx=\"{cx}\" cy=\"{cy}\" r=\"3\"/>");
            } else {
                let _ = write!(svg, "<polyline class=\"s{at}\" points=\"{line}\"/>");
            }
        }
        svg.push_str("</svg>");
        let names = self.series.iter().map(|series| series.name.as_str());
        let marks = format!("<script type=\"application/json\">{}</script>", data(&marks));
        figure(title, note, &format!("{svg}{marks}{}", legend(names)))
    }
}

/// At most [`MAX_LINE_POINTS`] points, each the mean of its neighbors.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let several = points.len().div_ceil(MAX_LINE_POINTS).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let sum = chunk.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / chunk.len() as f64, sum.1 / chunk.len() as f64)
    };
    points.chunks(several).map(mean).collect()
}

impl Bars {
    /// The figure; empty without bars.
    pub fn figure(self, title: &str, note: &str) -> String {
        let values = self.series.iter().flat_map(|(_, values)| values.iter().flatten().copied());
        if values.clone().next().is_none() {
            return String::new();
        }
        let y = Axis::new(values, false, Some((0.0, self.top)));
        let mut svg = String::new();
        frame(&mut svg, title, (&self.x, self.y), &y, self.format);
        let room = (WIDTH - LEFT - RIGHT) / self.names.len() as f64;
        let bar = (room * 0.8 / self.series.len() as f64).min(48.0);
        let zero = y_of(&y, 0.0);
        for (at, name) in self.names.iter().enumerate() {
            let middle = LEFT + (at as f64 + 0.5) * room;
            let _ = write!(
                svg,
                "<text class=\"tick\" x=\"{middle:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                HEIGHT - BOTTOM + 14.0,
                escape(name)
            );
            let mut left = middle - bar * self.series.len() as f64 / 2.0;
            for (series, (what, values)) in self.series.iter().enumerate() {
                if let Some(value) = values.get(at).copied().flatten() {
                    // What is nothing is still a mark.
                    let top = y_of(&y, value).min(zero - 1.0);
                    let what =
                        if self.series.len() > 1 { format!("{what}, ") } else { String::new() };
                    let _ = write!(
                        svg,
                        "<rect class=\"s{series}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" \
                         height=\"{:.1}\"><title>{}{}: {}</title></rect>",
                        (bar - 1.0).max(1.0),
                        zero - top,
                        escape(&what),
                        escape(name),
                        escape(&(self.format)(value))
                    );
                }
                left += bar;
            }
        }
        svg.push_str("</svg>");
        let names = self.series.iter().map(|(name, _)| name.as_str());
        figure(title, note, &format!("{svg}{}", legend(names)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axis_ticks_stay_within_range() {
        let sets: [&[f64]; 8] = [
            &[],
            &[0.0],
            &[1e-9],
            &[5.0, 5.0],
            &[-3.0, 1e6],
            &[1e-300, 1e300],
            &[0.1, 0.3],
            &[1e15, 1e15 + 1.0],
        ];
        for values in sets {
            for log in [false, true] {
                let values = values.iter().copied().filter(|value| !log || *value > 0.0);
                let axis = Axis::new(values, log, None);
                let ticks = axis.ticks();
                assert!(ticks.len() <= 20, "{ticks:?}");
                assert!(axis.from < axis.to, "{} to {}", axis.from, axis.to);
                for tick in ticks {
                    let place = axis.place(tick);
                    assert!((-1e-6..=1.0 + 1e-6).contains(&place), "{tick} at {place}");
                }
            }
        }
    }

    #[test]
    fn axis_positions_are_linear_or_logarithmic() {
        let linear = Axis::new([0.0, 10.0].into_iter(), false, None);
        assert_eq!(linear.ticks(), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(linear.place(2.5), 0.25);
        let log = Axis::new([0.01, 100.0].into_iter(), true, None);
        assert_eq!(log.ticks(), [0.01, 0.1, 1.0, 10.0, 100.0]);
        assert!((log.place(1.0) - 0.5).abs() < 1e-12);
        let within_a_decade = Axis::new([2.1, 4.8].into_iter(), true, None);
        assert_eq!(within_a_decade.ticks(), [2.0, 5.0]);
        assert_eq!(
            Axis::new([0.3, 7.0].into_iter(), true, None).ticks(),
            [0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
        );
    }

    #[test]
    fn line_chart_skips_non_finite_points() {
        let points = vec![(1.0, 1.0), (2.0, f64::NAN), (3.0, 0.0), (4.0, 10.0)];
        let series = vec![Series { name: "a".to_string(), points }];
        let lines = |log| Lines {
            x: "step",
            y: "nats",
            series: Vec::new(),
            log,
            include: None,
            format: short,
        };
        let drawn = Lines { series, ..lines(true) }.figure("loss <", "");
        assert_eq!(drawn.matches("<polyline").count(), 1);
        let points = drawn.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(points, "136.5,196.0 390.0,20.0");
        assert!(drawn.contains(">step</text>") && drawn.contains(">nats</text>"));
        assert!(drawn.contains("loss &lt;") && drawn.contains("step 4: 10"));
        assert_eq!(lines(false).figure("nothing", ""), "");
    }

    #[test]
    fn bar_height_matches_value() {
        let bars = Bars {
            x: "tokens given".to_string(),
            y: "windows",
            names: vec!["8".to_string(), "16".to_string()],
            series: vec![("model".to_string(), vec![Some(1.0), None])],
            top: 2.0,
            format: short,
        };
        let drawn = bars.figure("verbatim", "");
        assert_eq!(drawn.matches("<rect").count(), 1);
        assert!(drawn.contains("height=\"88.0\""), "{drawn}");
    }
}
