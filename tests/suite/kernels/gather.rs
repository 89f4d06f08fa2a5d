//! Windows drawn on the device, against those that the library draws.

use std::sync::Arc;

use laam::corpus::Document;
use laam::tokenizer::Style;
use laam::tokens::{AddressEncoder, TokenFile, WindowKind, Windows};

use super::*;

fn file() -> (Arc<TokenFile>, Arc<laam::tokenizer::Tokenizer>) {
    let tokenizer = crate::tokens::tokenizer(Style::Exact);
    let folder = tempfile::tempdir().unwrap();
    let texts = ["int main(void)\n{\n\treturn 0;\n}\n".repeat(5), String::new(), "x".into()];
    let documents: Vec<_> = texts
        .into_iter()
        .enumerate()
        .map(|(i, text)| Document::new(format!("d/{i}.c"), text))
        .collect();
    (crate::tokens::write(&folder.path().join("tokens"), &tokenizer, &documents), tokenizer)
}

pub fn gather_is_right(module: &Module) {
    let (file, tokenizer) = file();
    let pad = tokenizer.markers().unwrap().pad;
    let mut tokens = vec![0; file.tokens()];
    file.read(0, &mut tokens).unwrap();
    let longs = |numbers: &[usize]| -> Vec<u8> {
        numbers.iter().flat_map(|&number| (number as u64).to_le_bytes()).collect()
    };
    let shapes = [
        (WindowKind::Original, 7),
        (WindowKind::Original, 30),
        (WindowKind::Stream, 9),
        (WindowKind::Stream, 31),
    ];
    let shapes =
        shapes.into_iter().chain([(WindowKind::Addressed, 13), (WindowKind::Addressed, 40)]);
    for (kind, context) in shapes {
        let stride = 5;
        let windows =
            Windows::new(file.clone(), tokenizer.clone(), kind, context, Some(stride)).unwrap();
        let encoder = AddressEncoder::new(tokenizer.clone(), context);
        let places: Vec<_> =
            (0..windows.len()).map(|window| windows.span(window).unwrap()).collect();
        let starts: Vec<_> = places.iter().map(|place| place.tokens.start).collect();
        let lengths: Vec<_> = places.iter().map(|place| place.tokens.len() as u32).collect();
        let (mut addresses, mut address_starts) = (Vec::new(), vec![0]);
        if kind == WindowKind::Addressed {
            for place in &places {
                let path = file.document(place.document).unwrap().path;
                addresses.extend(encoder.address(path, place.chunk).unwrap().ids);
                address_starts.push(addresses.len() as u32);
            }
        }
        let documents: Vec<_> =
            (0..file.documents()).map(|d| file.document(d).unwrap().tokens.start).collect();

        // All windows, in reverse, after two that the cursor skips.
        let asked: Vec<_> = (0..windows.len()).rev().collect();
        let batch = windows.draw(&asked).unwrap();
        let order: Vec<u32> =
            [1, 0].into_iter().chain(asked.iter().map(|&window| window as u32)).collect();
        let rows = asked.len();
        let exact = [batch.ids, batch.targets, batch.first_key];
        for (ty, ids) in [
            ("u16", tokens.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect()),
            ("u32", words(&tokens)),
        ] {
            let mut pieces = vec![Piece::In(ids)];
            pieces.extend(match kind {
                WindowKind::Stream => vec![
                    value(tokens.len() as u64),
                    Piece::In(longs(&documents)),
                    value(documents.len() as i32),
                    value(stride as i32),
                ],
                _ => vec![Piece::In(longs(&starts)), Piece::In(words(&lengths))],
            });
            if kind == WindowKind::Addressed {
                pieces.extend([&addresses, &address_starts].map(|list| Piece::In(words(list))));
            }
            pieces.extend([Piece::In(words(&order)), Piece::In(words(&[2]))]);
            pieces.extend([(); 3].map(|()| Piece::Out(4 * rows * context)));
            pieces.extend([value(rows as i32), value(context as i32), value(pad)]);
            let config = Config { grid: [2, 3, 1], block: [32, 1, 1], shared: 0 };
            let name = format!("{kind:?}").to_lowercase();
            let got = run(module, &format!("gather_windows_{name}_{ty}"), config, &pieces);
            for (i, what) in ["ids", "targets", "first keys"].into_iter().enumerate() {
                assert!(got[i] == words(&exact[i]), "{what} of {name} windows of {context}");
            }
        }
    }
}

#[test]
fn gather_draws_the_windows_that_the_library_draws() {
    holds("gather_windows", gather_is_right);
}

pub const GATHER_WINDOWS: MutationSet = MutationSet {
    kernel: "gather_windows",
    only: &[],
    mutants: &[
        ("cursor_ignored", "*batch.cursor", "0"),
        ("last_position_has_target", "if (position + 1 < batch.seq_len) ", ""),
        (
            "earlier_document_visible",
            "begin > start ? static_cast<unsigned>(begin - start) : 0",
            "0",
        ),
        ("last_target_dropped", "position + 1 < length", "position + 2 < length"),
    ],
    check: gather_is_right,
};
