//! Continuous batching over a KV cache: requests take free slots, and each step decodes one token of
//! every running sequence.
//!
//! A sequence's tokens do not depend on the other sequences: on the `cpu` and `reference`
//! backends its logits are the same bits alone and in any batch, and a random number is named by
//! seed, sequence and position.

use rayon::prelude::*;

use super::Sampling;
use crate::backend::{Arena, Backend, DecodeShape, Inputs, ProgramId, Session, SessionSpec};
use crate::error;
use crate::llama::Buffer;
use crate::llama::step::{self, Decoding};
use crate::model::{Config, Layout};
use crate::threads;

/// Tokens of one sequence that a step takes at most.
const MAX_STEP_TOKENS: usize = 64;
/// Limit on the KV cache.
const MAX_KV_CACHE_BYTES: u128 = 8 << 30;
/// Limit on the logits of a step, if it has several sequences: the host reads them all.
const MAX_STEP_LOGITS: usize = 1 << 22;
/// Slots from which on threads share the choice of tokens.
const MIN_PARALLEL_SLOTS: usize = 65;

/// A generation request.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Limit on new tokens.
    pub max_new_tokens: usize,
    /// Tokens that end the sequence; the one that did is its last.
    pub stop: Vec<u32>,
    /// Sampling of its tokens.
    pub sampling: Sampling,
    /// Sequence number: with the seed it names the random stream.
    pub sequence: u32,
}

/// Reason for the end of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token.
    Stop,
    /// The limit on new tokens.
    Length,
    /// The end of the KV cache.
    Context,
}

/// A new token of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenEvent {
    /// The sequence, as [`Generator::admit`] numbered it.
    pub ticket: u64,
    /// Id of the token.
    pub id: u32,
    /// Set with the last token.
    pub finish: Option<FinishReason>,
}

/// New tokens of one request, and the reason for their end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// Generated ids.
    pub ids: Vec<u32>,
    /// Why generation ended.
    pub finish: FinishReason,
}

/// A model ready to generate.
pub struct Generator {
    session: Box<dyn Session>,
    vocab_size: usize,
    /// Tokens from here on are never chosen.
    choices: usize,
    /// Capacity of the KV cache per sequence, in tokens. One more token can follow.
    context: usize,
    slots: Vec<Option<Running>>,
    one: DecodeStep,
    /// Takes several tokens of each sequence: for prompts.
    several: Option<DecodeStep>,
    /// Tokens beyond the first of each sequence that make `several` worth its cost.
    min_prompt_tokens: usize,
    admitted: u64,
}

struct Running {
    ticket: u64,
    request: Request,
    /// The prompt and what came after it.
    tokens: Vec<u32>,
    /// Tokens in the KV cache.
    cached: usize,
}

/// A program that takes `fresh` tokens of each slot.
struct DecodeStep {
    program: ProgramId,
    fresh: usize,
    ids: Buffer,
    start: Buffer,
    position: Buffer,
    logits: Buffer,
}

impl Generator {
    /// Opens a session with a KV cache for `slots` sequences of at most `context` tokens, limited by
    /// `max_position_embeddings`; `weights` is an arena of the model's layout. The slots are fewer if the
    /// backend does not take so many, or their KV cache or logits exceed the limits.
    ///
    /// # Errors
    /// The KV cache of one sequence exceeds the limit.
    pub fn new(
        backend: &dyn Backend,
        config: &Config,
        weights: &[f32],
        slots: usize,
        context: usize,
    ) -> anyhow::Result<Self> {
        config.validate()?;
        let layout = Layout::new(config);
        let shape = backend.decode_shape();
        let context = context.clamp(1, config.max_position_embeddings);
        let slots = fitting_slots(backend, config, slots, context)?;
        let fresh = fresh_tokens(shape, slots, context);
        if slots >= MIN_PARALLEL_SLOTS {
            threads::start_global_pool()?;
        }
        // A step writes `fresh` rows of the cache in every slot, whatever each sequence has left.
        let capacity = context + fresh;
        let program = |fresh| step::decoding(config, &layout, slots, fresh, capacity);
        let one = program(1);
        let mut session = backend
            .open(&layout, SessionSpec { cache_len: one.cache_len, ..SessionSpec::default() })?;
        session.write(Arena::Parameters, weights)?;
        let one = DecodeStep::load(&mut *session, one, 1)?;
        let several = match fresh {
            0 | 1 => None,
            fresh => Some(DecodeStep::load(&mut *session, program(fresh), fresh)?),
        };
        let mut empty = Vec::new();
        empty.resize_with(slots, || None);
        let vocab_size = config.vocab_size;
        Ok(Self {
            session,
            vocab_size,
            choices: vocab_size,
            context,
            slots: empty,
            one,
            several,
            min_prompt_tokens: (slots * fresh).div_ceil(shape.prompt_tokens),
            admitted: 0,
        })
    }

    /// Never chooses a token that the tokenizer does not have: embeddings are often padded to a
    /// multiple of 64 rows.
    #[must_use]
    pub fn with_tokens(mut self, tokens: usize) -> Self {
        self.choices = self.choices.min(tokens.max(1));
        self
    }

    /// Free slots.
    pub fn free(&self) -> usize {
        self.slots.iter().filter(|slot| slot.is_none()).count()
    }

    /// True while a sequence is running.
    pub fn is_busy(&self) -> bool {
        self.free() < self.slots.len()
    }

    /// Capacity of the KV cache per sequence, in tokens. One more token can follow.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Takes a request in; its sequence is known by the number that is returned.
    pub fn admit(&mut self, request: Request) -> anyhow::Result<u64> {
        request.sampling.validate()?;
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(error::checkpoint(
                format!(
                    "the prompt has token {id}, but the vocabulary only {} tokens",
                    self.vocab_size
                ),
                "use the tokenizer that the model was trained with",
            ));
        }
        let length = request.prompt.len();
        if length == 0 || length > self.context {
            return Err(error::config(
                format!(
                    "invalid prompt of {length} tokens: must be at least 1 and at most {}",
                    self.context
                ),
                "change the prompt",
            ));
        }
        if request.max_new_tokens == 0 {
            return Err(error::invalid("max_new_tokens", 0, "at least 1"));
        }
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.is_none()) else {
            return Err(error::internal("no free slot in the generator"));
        };
        let ticket = self.admitted;
        self.admitted += 1;
        let tokens = request.prompt.clone();
        *slot = Some(Running { ticket, request, tokens, cached: 0 });
        Ok(ticket)
    }

    /// Ends a sequence early; its slot is free at once. Nothing happens if it has ended.
    pub fn cancel(&mut self, ticket: u64) {
        let is_it = |running: &Running| running.ticket == ticket;
        for slot in self.slots.iter_mut().filter(|slot| slot.as_ref().is_some_and(is_it)) {
            *slot = None;
        }
    }

    /// Takes every sequence further: through its prompt, or by one new token, returned as an event.
    /// An error ends all sequences.
    pub fn step(&mut self) -> anyhow::Result<Vec<TokenEvent>> {
        let result = self.try_step();
        if result.is_err() {
            self.slots.fill_with(|| None);
        }
        result
    }

    fn try_step(&mut self) -> anyhow::Result<Vec<TokenEvent>> {
        if !self.is_busy() {
            return Ok(Vec::new());
        }
        let step = match &self.several {
            // It costs as much as a few of the others: it has to take more tokens beyond the first
            // of each sequence.
            Some(several) if self.beyond_first(several.fresh) >= self.min_prompt_tokens => several,
            _ => &self.one,
        };
        let windows = self.slots.len();
        // A slot without a sequence, and rows beyond a sequence's tokens, hold token 0: a later token
        // overwrites it, and nothing attends to it before.
        let mut ids = vec![0; windows * step.fresh];
        let mut start = vec![0; windows];
        let mut position = vec![0; windows];
        for (slot, running) in self.slots.iter_mut().enumerate() {
            let Some(running) = running else { continue };
            let tokens = &running.tokens[running.cached..];
            let taken = tokens.len().min(step.fresh);
            ids[slot * step.fresh..][..taken].copy_from_slice(&tokens[..taken]);
            start[slot] = running.cached as u32;
            position[slot] = taken as u32 - 1;
            running.cached += taken;
        }
        let indices = vec![
            (step.ids, ids.as_slice()),
            (step.start, start.as_slice()),
            (step.position, position.as_slice()),
        ];
        self.session.run(step.program, &Inputs { indices, ..Inputs::default() })?;
        let logits = self.session.floats(step.program, step.logits)?;

        let choose = |(slot, logits): (&mut Option<Running>, &[f32])| {
            let Some(running) = slot else { return Ok(None) };
            if running.cached < running.tokens.len() {
                return Ok(None);
            }
            let event = running.choose(&logits[..self.choices], self.context)?;
            if event.finish.is_some() {
                *slot = None;
            }
            Ok(Some(event))
        };
        let events: anyhow::Result<Vec<Option<TokenEvent>>> = if windows < MIN_PARALLEL_SLOTS {
            self.slots.iter_mut().zip(logits.chunks(self.vocab_size)).map(choose).collect()
        } else {
            let rows = logits.par_chunks(self.vocab_size);
            self.slots.par_iter_mut().zip(rows).with_min_len(8).map(choose).collect()
        };
        Ok(events?.into_iter().flatten().collect())
    }

    /// Tokens beyond the first of each sequence that a step of `fresh` tokens per slot would take.
    fn beyond_first(&self, fresh: usize) -> usize {
        let running = self.slots.iter().flatten();
        running.map(|running| (running.tokens.len() - running.cached).min(fresh) - 1).sum()
    }

    /// Continuations of all requests, in their order.
    pub fn all(&mut self, requests: Vec<Request>) -> anyhow::Result<Vec<Continuation>> {
        let first = self.admitted;
        let mut answers =
            vec![Continuation { ids: Vec::new(), finish: FinishReason::Stop }; requests.len()];
        let mut requests = requests.into_iter();
        loop {
            for _ in 0..self.free() {
                let Some(request) = requests.next() else { break };
                self.admit(request)?;
            }
            if !self.is_busy() {
                return Ok(answers);
            }
            for event in self.step()? {
                let answer = &mut answers[(event.ticket - first) as usize];
                answer.ids.push(event.id);
                if let Some(finish) = event.finish {
                    answer.finish = finish;
                }
            }
        }
    }

    /// Seconds spent in each kind of operation so far, if the backend counts them.
    pub fn profile(&self) -> Vec<(&'static str, f64)> {
        self.session.profile()
    }
}

/// Slots, at most `slots`, that a backend takes and whose KV cache and logits are within the limits.
fn fitting_slots(
    backend: &dyn Backend,
    config: &Config,
    slots: usize,
    context: usize,
) -> anyhow::Result<usize> {
    let shape = backend.decode_shape();
    let token_bytes = 2
        * config.num_hidden_layers as u128
        * (config.num_key_value_heads * config.head_dim * size_of::<f32>()) as u128;
    let cache_bytes = |slots: usize| {
        token_bytes * slots as u128 * (context + fresh_tokens(shape, slots, context)) as u128
    };
    if cache_bytes(1) > MAX_KV_CACHE_BYTES {
        return Err(error::device(
            format!("the KV cache of {context} tokens would take {} bytes", cache_bytes(1)),
            format!(
                "generate fewer tokens: {} fit",
                (MAX_KV_CACHE_BYTES / token_bytes)
                    .saturating_sub(fresh_tokens(shape, 1, context) as u128)
            ),
        ));
    }
    let limit = backend.memory().map_or(MAX_KV_CACHE_BYTES, |bytes| u128::from(bytes) / 4);
    let fits = |slots: &usize| {
        cache_bytes(*slots) <= limit.min(MAX_KV_CACHE_BYTES)
            && slots * config.vocab_size <= MAX_STEP_LOGITS
    };
    let most = slots.clamp(1, shape.slots * shape.prompt_tokens);
    Ok((2..=most).rev().find(fits).unwrap_or(1))
}

/// Tokens of each sequence in a step for prompts.
fn fresh_tokens(shape: DecodeShape, slots: usize, context: usize) -> usize {
    (shape.slots * shape.prompt_tokens / slots).min(MAX_STEP_TOKENS).min(context)
}

impl Running {
    fn choose(&mut self, logits: &[f32], context: usize) -> anyhow::Result<TokenEvent> {
        let Self { ticket, request, tokens, .. } = self;
        let id = request.sampling.choose(logits, request.sequence, tokens.len())?;
        tokens.push(id);
        let finish = if request.stop.contains(&id) {
            Some(FinishReason::Stop)
        } else if tokens.len() - request.prompt.len() == request.max_new_tokens {
            Some(FinishReason::Length)
        } else if tokens.len() > context {
            Some(FinishReason::Context)
        } else {
            None
        };
        Ok(TokenEvent { ticket: *ticket, id, finish })
    }
}

impl DecodeStep {
    fn load(session: &mut dyn Session, decoding: Decoding, fresh: usize) -> anyhow::Result<Self> {
        let Decoding { program, ids, start, position, logits, .. } = decoding;
        Ok(Self { program: session.load(program)?, fresh, ids, start, position, logits })
    }
}
