//! Windows of a text that a model was not trained on: a control of the same kind as what it was trained on.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;

use crate::corpus::Manifest;
use crate::model::Provenance;
use crate::tokenizer::Tokenizer;
use crate::tokens::{TokenFile, WindowKind, Windows};

/// Windows by what the model was trained on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainingSplit {
    /// Windows of text that it was trained on.
    pub trained: Vec<usize>,
    /// Windows of text that no stage of its training had. A window of both kinds is in neither list.
    pub held_out: Vec<usize>,
    /// The text of each stage of the training.
    stages: Vec<TrainedText>,
}

impl TrainingSplit {
    /// True if a document is trained on, at least in part.
    pub fn has_document(&self, document: usize) -> bool {
        self.stages.iter().any(|stage| stage.documents[document])
    }

    /// True if a stage trained on all of these tokens.
    pub fn has(&self, tokens: &Range<usize>, file: &TokenFile) -> bool {
        self.stages.iter().any(|stage| stage.has(tokens, file))
    }

    /// True if a document is trained on in part.
    pub fn is_within_document(&self) -> bool {
        self.stages.iter().any(|stage| stage.boundary.is_some())
    }
}

/// The windows of these numbers, by whether the model was trained on them: by the fraction that it held
/// out, by the paths in its provenance if the text has all of those files and more, or by the number of
/// documents without names if they come from the same files. None if nothing of the text is known to be held
/// out, or nothing of it was trained on.
pub fn split(
    windows: &Windows,
    numbers: &[usize],
    tokenizer: &Arc<Tokenizer>,
    manifest: &Manifest,
    provenance: Option<&Provenance>,
) -> anyhow::Result<Option<TrainingSplit>> {
    let Some(provenance) = provenance else { return Ok(None) };
    // An earlier model of which nothing is known may have been trained on any of it.
    let is_unknown =
        |stage: &Provenance| stage.parent.as_ref().is_some_and(|parent| !parent.has_provenance);
    if provenance.stages().any(is_unknown) {
        return Ok(None);
    }
    let mut stages = Vec::new();
    for stage in provenance.stages() {
        stages.push(TrainedText::of(windows, tokenizer, manifest, stage)?);
    }
    let file = windows.file();
    let mut split = TrainingSplit { trained: Vec::new(), held_out: Vec::new(), stages };
    for &number in numbers {
        let tokens = windows.span(number)?.tokens;
        if split.has(&tokens, file) {
            split.trained.push(number);
        } else if split.stages.iter().all(|stage| stage.has_none_of(&tokens, file)) {
            split.held_out.push(number);
        }
    }
    Ok((!split.trained.is_empty() && !split.held_out.is_empty()).then_some(split))
}

/// Part of a text that one stage trained on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct TrainedText {
    /// True for each document that was trained on, at least in part.
    documents: Vec<bool>,
    /// Held out within a document: the end of the tokens that were trained on, and the first held-out one.
    boundary: Option<(usize, usize)>,
}

impl TrainedText {
    fn of(
        windows: &Windows,
        tokenizer: &Arc<Tokenizer>,
        manifest: &Manifest,
        stage: &Provenance,
    ) -> anyhow::Result<Self> {
        let (file, corpus) = (windows.file(), &stage.corpus);
        let is_same_text = corpus.manifest_sha256.as_ref() == Some(&manifest.hash());
        let named: HashSet<&str> = corpus.paths.iter().map(String::as_str).collect();
        let found: HashSet<&str> = manifest.files.iter().map(|file| file.path.as_str()).collect();
        let knows_names = named.is_subset(&found) && (is_same_text || !named.is_empty());
        let shards = |shards: &[crate::corpus::ShardRecord]| -> Vec<String> {
            shards.iter().map(|shard| shard.sha256.clone()).collect()
        };
        let knows_numbers = shards(&corpus.shards) == shards(&manifest.shards)
            && corpus.text_field == manifest.text_field;
        let records: u64 = corpus.shards.iter().map(|shard| shard.documents).sum();
        let mut unnamed = records.saturating_sub(corpus.held_out_documents);
        let mut documents = Vec::with_capacity(file.documents());
        for document in 0..file.documents() {
            let path = file.document(document)?.path;
            documents.push(if !path.is_empty() {
                !knows_names || named.contains(path)
            } else if !knows_numbers {
                true
            } else if unnamed > 0 {
                unnamed -= 1;
                true
            } else {
                false
            });
        }
        let boundary = if is_same_text { Self::boundary(windows, tokenizer, stage)? } else { None };
        Ok(Self { documents, boundary })
    }

    /// Token at which a held-out fraction begins, if that is within a document.
    fn boundary(
        windows: &Windows,
        tokenizer: &Arc<Tokenizer>,
        stage: &Provenance,
    ) -> anyhow::Result<Option<(usize, usize)>> {
        let recipe = &stage.recipe;
        let size = |key: &str| recipe[key].as_u64().map(|size| size as usize);
        let (Some(fraction), Some(context), Ok(kind)) = (
            recipe["validation"].as_f64(),
            size("max_position_embeddings"),
            serde_json::from_value::<WindowKind>(
                recipe.get("windows").cloned().unwrap_or(Value::Null),
            ),
        ) else {
            return Ok(None);
        };
        let file = windows.file().clone();
        // Of a provenance that somebody changed, the fraction may leave nothing.
        let cut = Windows::new(file, tokenizer.clone(), kind, context, size("stride"));
        let Ok(mut trained) = cut else { return Ok(None) };
        let Ok((all, held)) = trained.hold_out(fraction) else { return Ok(None) };
        let end = trained.span(trained.len() - 1)?.tokens.end;
        let start = all.span(held[0])?.tokens.start;
        let file = windows.file();
        let is_within = end > 0 && file.document_of(end - 1) == file.document_of(start);
        Ok(is_within.then_some((end, start)))
    }

    fn documents_of(&self, tokens: &Range<usize>, file: &TokenFile) -> &[bool] {
        let document = |token| file.document_of(token);
        &self.documents[document(tokens.start)..=document(tokens.end.max(tokens.start + 1) - 1)]
    }

    /// True if all tokens were trained on.
    fn has(&self, tokens: &Range<usize>, file: &TokenFile) -> bool {
        self.documents_of(tokens, file).iter().all(|&trained| trained)
            && self.boundary.is_none_or(|(end, _)| tokens.end <= end)
    }

    /// True if no token was trained on.
    fn has_none_of(&self, tokens: &Range<usize>, file: &TokenFile) -> bool {
        self.documents_of(tokens, file).iter().all(|&trained| !trained)
            || self.boundary.is_some_and(|(_, start)| tokens.start >= start)
    }
}
