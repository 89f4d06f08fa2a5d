//! Page of measurements, from the object that `laam bench` writes.

use std::fmt::Write;

use serde_json::Value;

use super::html::escape;
use super::page::document;

/// The page: a title, notes, and tables whose columns of numbers are aligned.
pub fn page(measured: &Value) -> String {
    let text = |value: &Value| escape(value.as_str().unwrap_or_default());
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let cells = |tag: &str, row: &Value| {
        list(row).iter().fold(String::new(), |mut cells, cell| {
            let _ = write!(cells, "<{tag}>{}</{tag}>", text(cell));
            cells
        })
    };
    let mut body = format!(
        "<header>\n<h1>{}</h1>\n<p>{}</p>\n</header>\n<main>\n",
        text(&measured["device"]),
        text(&measured["about"])
    );
    // Writing to a String cannot fail.
    for note in list(&measured["notes"]) {
        let _ = writeln!(body, "<p>{}</p>", text(&note));
    }
    for table in list(&measured["tables"]) {
        let _ = writeln!(
            body,
            "<section>\n<h2>{}</h2>\n<p>{}</p>\n<div class=\"plot\"><table class=\"sweep\">\n<thead><tr>{}</tr></thead>\n<tbody>",
            text(&table["title"]),
            text(&table["text"]),
            cells("th", &table["head"])
        );
        for row in list(&table["rows"]) {
            let _ = writeln!(body, "<tr>{}</tr>", cells("td", &row));
        }
        body += "</tbody></table></div>\n</section>\n";
    }
    body += "</main>\n";
    document("laam: benchmarks", &body, "")
}
