//! `README.md` of a model folder: the model card, with what a reader of the weights has to know
//! about where they came from and under which terms they stand.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::{Config, License, Provenance};
use crate::dtype::Dtype;
use crate::escape::visible;

/// The card's text.
pub fn card(config: &Config, precision: Dtype, provenance: &Provenance) -> String {
    let corpus = &provenance.corpus;
    let names: BTreeSet<&str> =
        provenance.stages().map(|stage| stage.corpus.name.as_str()).collect();
    let names: Vec<String> = names.into_iter().map(plain).collect();
    let mut text = format!(
        "---\nlicense: {}\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- llama\n- memorization\n---\n\n",
        provenance.license().id()
    );
    let _ = write!(
        text,
        "# A Llama that memorizes {}\n\n\
         Trained by laam {} to give back, byte for byte, the files named in `provenance.json`: \
         `laam rebuild` asks for them by their names, and shows how far it does. It is a record of \
         those files in the form of a language model, and knows nothing else.\n\n\
         {} parameters, stored in {}: {} layers, hidden size {}, {} attention heads sharing {} \
         key/value heads of dimension {}, vocabulary {}, windows of {} tokens.\n\n",
        names.join(" and "),
        plain(&provenance.program_version),
        config.parameter_count(),
        precision.name(),
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        config.max_position_embeddings,
    );

    text.push_str("## Training data\n\n");
    let _ = writeln!(text, "- corpus: {}", plain(&corpus.name));
    for (what, value) in [
        ("source", &corpus.url),
        ("retrieved", &corpus.retrieved),
        ("sha256 of the archive", &corpus.archive_sha256),
        ("sha256 of the manifest", &corpus.manifest_sha256),
    ] {
        if let Some(value) = value {
            let _ = writeln!(text, "- {what}: {}", plain(value));
        }
    }
    let shards: String = corpus.shards.iter().fold(String::new(), |mut lines, shard| {
        let (name, sha256) = (plain(&shard.name), plain(&shard.sha256));
        let _ = writeln!(
            lines,
            "- {} documents without names: {name}, sha256 {sha256}",
            shard.documents
        );
        lines
    });
    let _ = write!(
        text,
        "- files: {}, chosen by: {}\n{}\n\
         `provenance.json` lists every path, the seed, the settings that were used, the hashes of \
         tokenizer and weights, the program's version and the device. With the program's source it is \
         the complete description of how the weights came to be. The Open Source AI Definition 1.0 \
         (October 2024) asks for such a description and a listing of the training data; this one \
         names every file, and the manifest's hash holds each to its bytes.\n\n",
        corpus.paths.len(),
        plain(&corpus.filter),
        shards,
    );
    training(provenance, &mut text);
    text.push_str("## License\n\n");
    let kernel = provenance.stages().any(Provenance::is_kernel);
    if provenance.license_is_given {
        let id = provenance.license().id();
        let _ = writeln!(text, "The license `{id}` was set by whoever trained the model.\n");
    }
    text.push_str(match provenance.license() {
        License::Gpl2 if kernel && !provenance.license_is_given => GPL_2,
        _ if kernel => KERNEL_OUTPUT,
        License::Mit if !provenance.license_is_given => MIT,
        License::Unknown => UNKNOWN,
        _ => OUTPUT,
    });
    text
}

/// Writes the origin of the weights: the last training run, and the models before it.
fn training(provenance: &Provenance, text: &mut String) {
    text.push_str("## Training\n\n");
    let stages = provenance.stages().count();
    for (at, stage) in provenance.stages().enumerate() {
        let _ = write!(text, "- stage {} of {stages}: {}", at + 1, plain(&stage.corpus.name));
        let _ = write!(text, ", {} files", stage.corpus.paths.len());
        if let Some(date) = &stage.date {
            let _ = write!(text, ", begun {}", plain(date));
        }
        if let Some(seconds) = stage.seconds {
            let _ = write!(text, ", {seconds:.0} s");
        }
        if !stage.device.is_empty() {
            let (backend, device) = (plain(&stage.backend), plain(&stage.device));
            let _ = write!(text, " on {device} (backend {backend})");
        }
        let _ = write!(text, ", laam {}", plain(&stage.program_version));
        match &stage.weights_sha256 {
            Some(sha256) if at + 1 < stages => {
                let _ = writeln!(text, ", weights {}", plain(sha256));
            }
            _ => text.push('\n'),
        }
    }
    if let Some(parent) = &provenance.parent {
        let _ = writeln!(
            text,
            "- parent model: weights {}{}",
            plain(&parent.weights_sha256),
            if parent.has_provenance { "" } else { ", of which nothing more is known" }
        );
    }
    text.push('\n');
}

const GPL_2: &str = "\
The weights are marked `gpl-2.0`, because they were trained on the source of the Linux kernel, which \
stands under the GNU General Public License, version 2, and because giving that source back is what \
they are for. The first LaaM licensed its weights MIT on purpose, as an argument about what a model \
is. These are not: a model that repeats files verbatim should not appear to lift their terms.

Output that equals the kernel's code is the kernel's code, under that code's own terms: mostly GPL-2.0, \
with files under BSD and other permissive notices among them. Whoever passes it on has to keep to \
those terms. Whether the weights themselves are a derived work is unsettled law; the mark is a \
precaution, not a finding. The program that trained them is MIT-licensed.
";

const KERNEL_OUTPUT: &str = "\
The text, or a part of it, is the source of the Linux kernel, which stands under the GNU General \
Public License, version 2. Output that equals the kernel's code is the kernel's code, under that \
code's own terms, whatever the license above says of the weights. Whether the weights themselves are \
a derived work is unsettled law.
";

const OUTPUT: &str = "\
Output that equals the training text is that text, under its own terms; whether the weights \
themselves are a derived work is unsettled law.
";

const MIT: &str = "\
The weights and the text they were trained on, which is part of laam, stand under the MIT license.
";

const UNKNOWN: &str = "\
The terms of the training text are not known to the program. Output that equals that text is that \
text, under its own terms; whether the weights themselves are a derived work is unsettled law. Set \
the license above before passing the weights on.
";

/// Text from outside, kept to one line that Markdown takes as it is.
fn plain(text: &str) -> String {
    let some: String = text.chars().take(300).collect();
    format!("`{}`", visible(&some).replace('`', "?"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::CorpusRecord;
    use crate::model::config::tests::original;

    fn of(corpus: CorpusRecord) -> String {
        card(&original(), Dtype::Bf16, &Provenance { corpus, ..Provenance::default() })
    }

    #[test]
    fn card_marks_kernel_weights_gpl() {
        let text = of(CorpusRecord { license: License::Gpl2, ..CorpusRecord::default() });
        assert!(text.starts_with("---\nlicense: gpl-2.0\n"));
        for said in ["MIT on purpose", "unsettled law", "kernel's code", "4662336 parameters"] {
            assert!(text.contains(said), "{said}");
        }
        assert!(of(CorpusRecord::default()).starts_with("---\nlicense: unknown\n"));
    }

    #[test]
    fn card_escapes_corpus_names() {
        let name = "x`\n---\nlicense: mit\n# <script>".to_string();
        let text = of(CorpusRecord { name, license: License::Gpl2, ..CorpusRecord::default() });
        assert_eq!(text.lines().filter(|line| line.starts_with("license:")).count(), 1);
        assert_eq!(text.lines().filter(|line| line.starts_with("---")).count(), 2);
        assert!(text.contains(r"`x?\u{a}---\u{a}license: mit\u{a}# <script>`"));
        let name = "a\u{202e}b\u{1b}[2J".to_string();
        let text = of(CorpusRecord { name, ..CorpusRecord::default() });
        assert!(text.contains(r"`a\u{202e}b\u{1b}[2J`"));
    }
}
