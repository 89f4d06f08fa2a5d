//! Text and numbers as a page has them.

use serde::Serialize;

use crate::escape::{visible_json, visible_lines};

/// Text from outside, for between tags and within quotes.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in visible_lines(text).chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(c),
        }
    }
    escaped
}

/// Data for the page's script: JSON in which nothing can end the element that holds it. The script makes
/// strings visible when it shows them.
pub fn data(value: &impl Serialize) -> String {
    let json = serde_json::to_string(value).unwrap_or_default();
    visible_json(&json).replace('<', "\\u003c")
}

/// 1234567 as 1,234,567.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number in three digits or so: 0.00123, 1.23e-7, 33,500, 2.41M.
pub fn short(number: f64) -> String {
    let size = number.abs();
    if number == 0.0 {
        "0".to_string()
    } else if (1e6..1e9).contains(&size) {
        short(number / 1e6) + "M"
    } else if size >= 1000.0 {
        let sign = if number < 0.0 { "-" } else { "" };
        format!("{sign}{}", grouped(size.round() as u64))
    } else if size >= 1e-3 {
        let digits = (2 - size.log10().floor() as i32).clamp(0, 5) as usize;
        let text = format!("{number:.digits$}");
        if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').to_string()
        } else {
            text
        }
    } else {
        let text = format!("{number:.2e}");
        text.replace(".00e", "e")
    }
}

/// A time in its two largest units: 45.2 s, 3 min 5 s, 2 h 10 min.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{} s", short(seconds)),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A number of bytes in its largest unit: 512 bytes, 1.23 MB.
pub fn bytes(bytes: f64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let unit = units.into_iter().find(|(size, _)| bytes >= *size);
    unit.map_or_else(
        || format!("{} bytes", short(bytes)),
        |(size, unit)| format!("{} {unit}", short(bytes / size)),
    )
}

/// A part of 1: 98.4%. All is 100% and none is 0% only when they are.
pub fn percent(part: f64) -> String {
    if part == 0.0 || part == 1.0 {
        return format!("{:.0}%", 100.0 * part);
    }
    let text = format!("{:.1}", (100.0 * part).clamp(0.1, 99.9));
    format!("{}%", text.trim_end_matches(".0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn html_escapes_text_and_shortens_numbers() {
        let times = [0.123, 59.4, 185.0, 7800.0].map(duration);
        assert_eq!(times, ["0.123 s", "59.4 s", "3 min 5 s", "2 h 10 min"]);
        for (number, text) in [
            (0.0, "0"),
            (0.001234, "0.00123"),
            (0.5, "0.5"),
            (12.0, "12"),
            (100.0, "100"),
            (1.234e-7, "1.23e-7"),
            (1e-5, "1e-5"),
            (33_500.4, "33,500"),
            (-1234.0, "-1,234"),
            (2_414_866.0, "2.41M"),
        ] {
            assert_eq!(short(number), text);
        }
        assert_eq!([512.0, 1.234e8, 2e9].map(bytes), ["512 bytes", "123 MB", "2 GB"]);
        assert_eq!(grouped(4_662_336), "4,662,336");
        let parts = [1.0, 0.99999, 0.2, 0.0].map(percent);
        assert_eq!(parts, ["100%", "99.9%", "20%", "0%"]);
        assert_eq!(escape("<a href='x'>&\""), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;");
        assert_eq!(data(&"</script>"), "\"\\u003c/script>\"");
        assert_eq!(escape("a\u{202e}\t\n\r"), "a\\u{202e}\t\n\\u{d}");
        assert_eq!(data(&"\u{202e}"), "\"\\u202e\"");
    }
}
