//! The command line: one file per subcommand, from arguments to a call of the library. All printing
//! to the terminal happens here, through `output`: data on stdout, messages and progress on stderr.

// They panic if nobody reads what they print.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod backend;
mod bench;
mod bench_page;
mod cat;
mod check;
mod completions;
mod doctor;
mod evaluate;
mod export;
mod fetch;
mod generate;
mod group;
mod interrupt;
mod library_path;
mod ls;
mod memorization;
mod model;
mod output;
mod own_processes;
mod plan;
mod progress;
mod rebuild;
mod report;
mod run;
pub mod source;
mod sweep;
mod tokenize;
mod train;
mod train_tokenizer;
mod training;
mod windows;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde_json::{Value, json};

use self::interrupt::Interrupted;
use self::output::{print_json, say, stdout};
use crate::collective::{GROUP_EXIT_CODE, OtherRankFailed};
use crate::error::{self, ErrorKind, hint_of, kind_of, with_flags};
use crate::escape::visible;
use crate::schema::versioned;
use crate::train::RunEnd;

/// Train a Llama on source code until it gives it back, and prove it.
#[derive(Parser, Debug)]
#[command(name = "laam", version = crate::VERSION, max_term_width = 100, after_help = JSON_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const JSON_HELP: &str = "\
With --json a command prints one JSON object on stdout; messages go to stderr as without it. If the
command fails, the object is {\"error\": {\"kind\", \"message\", \"hint\"}}, and the exit code 2.";

#[derive(Subcommand, Debug)]
enum Command {
    Bench(bench::BenchArgs),
    Cat(cat::CatArgs),
    Check(check::CheckArgs),
    Completions(completions::CompletionsArgs),
    Doctor(doctor::DoctorArgs),
    Evaluate(evaluate::EvaluateArgs),
    Export(export::ExportArgs),
    Fetch(fetch::FetchArgs),
    Generate(generate::GenerateArgs),
    Ls(ls::LsArgs),
    Memorization(memorization::MemorizationArgs),
    Plan(Box<plan::PlanArgs>),
    Rebuild(rebuild::RebuildArgs),
    Report(report::ReportArgs),
    Run(run::RunArgs),
    Sweep(sweep::SweepArgs),
    TrainTokenizer(train_tokenizer::TrainTokenizerArgs),
    Tokenize(tokenize::TokenizeArgs),
    Train(Box<train::TrainArgs>),
}

/// Flags of earlier versions, accepted without effect.
#[derive(Args, Debug)]
pub(crate) struct ObsoleteArgs {
    #[arg(long, hide = true)]
    deterministic: bool,
}

impl ObsoleteArgs {
    /// Warns of a flag that was given.
    fn warn(&self) {
        if self.deterministic {
            say!("warning: --deterministic has no effect: every run is deterministic");
        }
    }
}

/// Exit code of the process. An error is 2, or 75 if the group of processes failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done = 0,
    /// A check ran and found a difference, or a run diverged.
    Different = 1,
    /// Ctrl-C: the step was finished and saved.
    Interrupted = 130,
}

impl From<RunEnd> for Outcome {
    fn from(end: RunEnd) -> Self {
        match end {
            RunEnd::Complete => Self::Done,
            RunEnd::Interrupted => Self::Interrupted,
            RunEnd::Diverged => Self::Different,
        }
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    panic::set_hook(Box::new(|info| {
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = one_line(&info.to_string());
    }));
    library_path::leave_out_current_folder();
    let json = wants_json(std::env::args_os());
    group::note_rank();
    match parse(std::env::args_os()) {
        Ok(Some((command, spec))) => {
            let run = panic::catch_unwind(AssertUnwindSafe(|| run(command)));
            let outcome = run.unwrap_or_else(|_| Err(panicked()));
            match outcome.and_then(|outcome| output::check_stdout().map(|()| outcome)) {
                Ok(outcome) => {
                    group::finish();
                    ExitCode::from(outcome as u8)
                }
                Err(error) => fail(&error, json, |field| flag(&spec, field)),
            }
        }
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => fail(&error, json, |_| None),
    }
}

/// Text of the last panic: one that is not caught is an internal error, told as errors are.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

fn panicked() -> anyhow::Error {
    error::internal(LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner))
}

/// True if the arguments, which may be invalid, ask for JSON.
fn wants_json(arguments: impl Iterator<Item = OsString>) -> bool {
    arguments.take_while(|argument| argument != "--").any(|argument| argument == "--json")
}

/// Prints an error, to stdout too if `json` is asked for; its exit code. `flag` names the flag of a field.
fn fail(error: &anyhow::Error, json: bool, flag: impl Fn(&str) -> Option<String>) -> ExitCode {
    if is_broken_pipe(error) {
        return ExitCode::SUCCESS;
    }
    if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
        say!("interrupted: {}", interrupted.hint);
        if json {
            print_json(&versioned(json!({"interrupted": true})));
        }
        return ExitCode::from(Outcome::Interrupted as u8);
    }
    let line = |text: &str| with_flags(&one_line(text), &flag);
    let message = line(&format!("{error:#}"));
    let hint = hint_of(error).map(line);
    // An error of another process, which tells of it.
    let other = error.downcast_ref::<OtherRankFailed>();
    if other.is_none() {
        output::write_error(&format!("laam: {message}"));
        if let Some(hint) = &hint {
            output::write_error(&format!("hint: {hint}"));
        }
    }
    let is_group = other.map_or(kind_of(error) == Some(ErrorKind::Group), |other| other.is_group);
    if json {
        let kind = kind_of(error).map(ErrorKind::name);
        let error = json!({"kind": kind, "message": message, "hint": hint});
        output::print_json(&versioned(json!({"error": error})));
    }
    let code = if is_group { GROUP_EXIT_CODE } else { 2 };
    group::fail(code);
    ExitCode::from(code as u8)
}

/// The flag of a subcommand that sets a field: `batch_size` is set by `--batch-size`.
fn flag(spec: &clap::Command, field: &str) -> Option<String> {
    let field = field.replace('_', "-");
    let sets = |arg: &&clap::Arg| {
        let aliases = arg.get_all_aliases().unwrap_or_default();
        arg.get_long() == Some(&field) || aliases.contains(&field.as_str())
    };
    Some(format!("--{}", spec.get_arguments().find(sets)?.get_long()?))
}

/// Clap's description of the program.
fn spec() -> clap::Command {
    // A value may be a negative number: that it is out of range is said by whoever knows the range.
    fn allow_negative_numbers(command: clap::Command) -> clap::Command {
        let takes_value = |arg: &clap::Arg| arg.get_action().takes_values();
        command
            .mut_args(|arg| if takes_value(&arg) { arg.allow_negative_numbers(true) } else { arg })
            .mut_subcommands(allow_negative_numbers)
    }
    allow_negative_numbers(Cli::command())
}

/// The command that was given, with clap's description of its flags; none if help was printed.
fn parse(
    arguments: impl Iterator<Item = OsString>,
) -> anyhow::Result<Option<(Command, clap::Command)>> {
    let mut spec = spec();
    let mut words: Vec<OsString> = normalize(arguments).collect();
    let Some(mut matches) = matches_of(&mut spec, &words)? else { return Ok(None) };
    let command_of = |matches: &clap::ArgMatches| -> anyhow::Result<Command> {
        Ok(Cli::from_arg_matches(matches).map_err(|bad| usage_error(&bad))?.command)
    };
    let mut command = command_of(&matches)?;
    if let (Command::Plan(plan), Some((_, given))) = (&mut command, matches.subcommand()) {
        plan.note_given(given);
    }
    if let Command::Train(train) = &mut command {
        let flags = spec.find_subcommand("train").expect("it was parsed").clone();
        let given = |matches: &clap::ArgMatches, train: &mut train::TrainArgs| {
            if let Some((_, given)) = matches.subcommand() {
                train.note_given(given, &flags);
            }
        };
        given(&matches, train);
        let more = train.flags_of_config(&flags)?;
        if !more.is_empty() {
            // After the name of the subcommand.
            words.splice(2..2, normalize(more.into_iter()));
            let Some(with_more) = matches_of(&mut spec, &words)? else { return Ok(None) };
            matches = with_more;
            command = command_of(&matches)?;
            if let Command::Train(train) = &mut command {
                given(&matches, train);
            }
        }
    }
    let mut given = &matches;
    while let Some((name, below)) = given.subcommand() {
        spec = spec.find_subcommand(name).cloned().unwrap_or(spec);
        given = below;
    }
    Ok(Some((command, spec)))
}

/// Arguments as clap parses them; none if help was printed.
fn matches_of(
    spec: &mut clap::Command,
    words: &[OsString],
) -> anyhow::Result<Option<clap::ArgMatches>> {
    match spec.try_get_matches_from_mut(words) {
        Ok(matches) => Ok(Some(matches)),
        // Help and version are data, not errors.
        Err(help) if !help.use_stderr() => {
            help.print().map_err(output::unwritten)?;
            Ok(None)
        }
        // No subcommand at all: clap's message is the help itself.
        Err(help)
            if help.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand =>
        {
            output::write_to_stderr(&help.render().to_string());
            Err(error::config("no command", "laam run trains the sample and proves it"))
        }
        Err(bad) => Err(usage_error(&bad)),
    }
}

fn run(command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Cat(arguments) => cat::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Completions(arguments) => completions::run(&arguments, spec()),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Evaluate(arguments) => evaluate::run(&arguments),
        Command::Export(arguments) => export::run(&arguments),
        Command::Fetch(arguments) => fetch::run(&arguments),
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Ls(arguments) => ls::run(&arguments),
        Command::Memorization(arguments) => memorization::run(&arguments),
        Command::Plan(arguments) => plan::run(&arguments),
        Command::Rebuild(arguments) => rebuild::run(&arguments),
        Command::Report(arguments) => report::run(&arguments),
        Command::Run(arguments) => {
            group::refuse_several("run")?;
            run::run(&arguments)
        }
        Command::Sweep(arguments) => {
            group::refuse_several("sweep")?;
            sweep::run(&arguments)
        }
        Command::TrainTokenizer(arguments) => train_tokenizer::run(&arguments),
        Command::Tokenize(arguments) => tokenize::run(&arguments),
        Command::Train(arguments) => train::run(*arguments),
    }
}

/// Flags are accepted with `-` and with `_` inside: `--batch_size` is `--batch-size`. A negative number
/// after a flag becomes its value, `--flag=-1e-3`: clap takes only some of them for numbers.
fn normalize(arguments: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    let mut flags = true;
    let mut words: Vec<OsString> = Vec::new();
    for argument in arguments {
        let text = argument.to_str().filter(|text| flags && text.starts_with('-'));
        let number = text.filter(|text| text.parse::<f64>().is_ok());
        let flag = words.last_mut().filter(|last| {
            let name = last.to_str().and_then(|last| last.strip_prefix("--"));
            name.is_some_and(|name| !name.is_empty() && !name.contains('='))
        });
        if let (Some(number), Some(flag)) = (number, flag) {
            flag.push("=");
            flag.push(number);
            continue;
        }
        let Some(text) = text.filter(|text| text.starts_with("--")) else {
            words.push(argument);
            continue;
        };
        flags = text != "--";
        words.push(match text.split_once('=') {
            Some((flag, value)) => format!("{}={value}", flag.replace('_', "-")).into(),
            None => text.replace('_', "-").into(),
        });
    }
    words.into_iter()
}

/// Clap's first paragraph as one line, and its advice, or the command's help, as the hint.
fn usage_error(bad: &clap::Error) -> anyhow::Error {
    let text = bad.render().to_string();
    let mut paragraphs = text.split("\n\n");
    let what = paragraphs.next().unwrap_or_default().trim_start_matches("error: ");
    let tip = paragraphs
        .flat_map(str::lines)
        .find_map(|line| line.trim().strip_prefix("tip: "))
        .map_or_else(|| "see laam --help, or laam COMMAND --help".to_string(), String::from);
    error::config(one_line(what), tip)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Prints a JSON object as it is, or its fields as `name: value`, one per line.
fn print_fields(object: Value, as_json: bool) -> io::Result<()> {
    if as_json {
        print_json(&versioned(object));
        return Ok(());
    }
    let mut out = stdout();
    for (name, value) in object.as_object().into_iter().flatten() {
        let value = value.as_str().map_or_else(|| value.to_string(), String::from);
        writeln!(out, "{name}: {}", visible(&value))?;
    }
    Ok(())
}

/// The reader of our output went away (`laam ... | head`): that is no error of ours.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// True if bars and colors are drawn, for a person.
pub(crate) fn is_interactive() -> bool {
    output::rank() == 0 && io::stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn underscores_in_flags_become_dashes_and_values_stay() {
        let given = ["laam", "train", "--batch_size", "a_b", "--hidden_size=x_y", "--", "--c_d"];
        let meant = ["laam", "train", "--batch-size", "a_b", "--hidden-size=x_y", "--", "--c_d"];
        let normal: Vec<_> = normalize(given.iter().map(OsString::from)).collect();
        assert_eq!(normal, meant.map(OsString::from));
    }

    #[test]
    fn arguments_are_well_formed() {
        spec().debug_assert();
    }

    #[test]
    fn every_command_prints_json_and_every_bench_has_its_help() {
        // A shell's completions are data of their own.
        let commands = spec();
        for command in commands.get_subcommands().filter(|it| it.get_name() != "completions") {
            let below: Vec<_> = command.get_subcommands().collect();
            let all = if below.is_empty() { vec![command] } else { below };
            let mut helps = Vec::new();
            for mut command in all.into_iter().cloned() {
                let has = command.get_arguments().any(|arg| arg.get_long() == Some("json"));
                assert!(has, "{}", command.get_name());
                helps.push(command.render_help().to_string());
            }
            helps.sort();
            helps.dedup_by(|a, b| a.lines().next() == b.lines().next());
            assert!(command.get_name() != "bench" || helps.len() == 5);
        }
    }

    /// The help of a command and of all below it.
    fn helps(mut command: clap::Command) -> Vec<String> {
        command.build();
        let below = command.get_subcommands().cloned().flat_map(helps).collect::<Vec<_>>();
        let both = [command.render_help().to_string(), command.render_long_help().to_string()];
        both.into_iter().chain(below).collect()
    }

    #[test]
    fn help_has_no_rustdoc_links_and_no_obsolete_flags() {
        let helps = helps(spec());
        assert!(helps.len() > 40, "every subcommand's");
        for help in helps {
            for markup in ["[`", "`]", "--deterministic", "--decay-rate", "ceilings"] {
                assert!(!help.contains(markup), "{markup}: {help}");
            }
        }
    }

    fn parsed(line: &str) -> anyhow::Result<Command> {
        let words = line.split_whitespace().map(OsString::from);
        Ok(parse(words)?.expect("not the help").0)
    }

    #[test]
    fn earlier_spellings_are_aliases() {
        for (earlier, now) in [
            ("laam plan --attention scalar", "laam plan --attention-kernel no-tensor-cores"),
            ("laam plan --attention plain", "laam plan --attention-kernel generic"),
            ("laam plan --head plain", "laam plan --lm-head-kernel generic"),
            ("laam plan --decay_rate 0.5", "laam plan --weight_decay 0.5"),
            ("laam plan --deterministic", "laam plan"),
            (
                "laam rebuild m --output o --max_tokens_a_file 7",
                "laam rebuild m --output o --max-tokens-per-file 7",
            ),
            ("laam bench ceilings", "laam bench roofline"),
            ("laam train --precision bf16", "laam train --precision bfloat16"),
            ("laam plan --precision fp16", "laam plan --precision float16"),
            ("laam bench step --precision fp32", "laam bench step --precision float32"),
            ("laam check --precision bf16", "laam check --precision bfloat16"),
        ] {
            let shown = |line| {
                let text = format!("{:?}", parsed(line).unwrap());
                text.replace("deterministic: true", "deterministic: false")
            };
            assert_eq!(shown(earlier), shown(now));
        }
    }

    #[test]
    fn negative_numbers_are_values() {
        let Command::Train(train) = parsed("laam train --learning_rate -0.5 --epochs -1").unwrap()
        else {
            panic!("another command")
        };
        let text = format!("{train:?}");
        assert!(text.contains("learning_rate: -0.5,") && text.contains("epochs: -1.0,"), "{text}");
        for (line, field) in [
            ("laam train --learning_rate -1e-3", "learning_rate: -0.001,"),
            ("laam train --rope_theta -.5", "rope_theta: -0.5,"),
            ("laam train --rope_theta -inf", "rope_theta: -inf,"),
            ("laam generate -- -1e-3", "model: \"-1e-3\""),
            ("laam generate m --prompt -1e-3", "prompt: Some(\"-1e-3\")"),
        ] {
            let text = format!("{:?}", parsed(line).unwrap());
            assert!(text.contains(field), "{line}: {text}");
        }
    }

    #[test]
    fn key_value_heads_are_as_many_as_heads_that_four_does_not_divide() {
        for (flags, expected) in [
            ("", 4),
            (" --num_attention_heads 32", 4),
            (" --num_attention_heads 5", 5),
            (" --num_attention_heads 5 --num_key_value_heads 1", 1),
        ] {
            let text = format!("{:?}", parsed(&format!("laam plan{flags}")).unwrap());
            assert!(text.contains(&format!("num_key_value_heads: {expected},")), "{flags}: {text}");
        }
    }

    #[test]
    fn plans_of_several_processes_have_a_window_per_slice() {
        for (flags, expected) in [
            ("", 1),
            (" --ranks 8 --shard optimizer", 8),
            (" --ranks 2 --dp_slices 4", 4),
            (" --ranks 8 --batch_size 1", 1),
            (" --ranks 2 --batch_size 64", 64),
        ] {
            let text = format!("{:?}", parsed(&format!("laam plan{flags}")).unwrap());
            assert!(text.contains(&format!(" batch_size: {expected},")), "{flags}: {text}");
        }
    }

    #[test]
    fn every_command_takes_json() {
        fn look(command: &clap::Command) {
            if command.has_subcommands() && command.get_name() != "bench" {
                return command.get_subcommands().for_each(look);
            }
            let takes = command.get_arguments().any(|arg| arg.get_long() == Some("json"));
            assert!(takes, "{}", command.get_name());
        }
        spec().get_subcommands().for_each(look);
    }

    #[test]
    fn errors_name_the_flags_of_the_subcommand() {
        let (_, spec) = parse(["laam", "train"].map(OsString::from).into_iter()).unwrap().unwrap();
        for (field, expected) in [
            ("batch_size", Some("--batch-size")),
            ("decay_rate", Some("--weight-decay")),
            ("vocab_size", None),
            ("batch-size x", None),
        ] {
            assert_eq!(flag(&spec, field).as_deref(), expected, "{field}");
        }
    }
}
