//! Progress on stderr: a bar for a person at a terminal, a plain line now and then for a log.

use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::is_interactive;
use super::output::say;
use crate::corpus::{FetchEvent, public_url};
use crate::escape::visible;

/// Interval of the lines in a log.
const INTERVAL: Duration = Duration::from_secs(10);

/// Progress of something counted in bytes. No colors are used, whatever `NO_COLOR` says.
pub struct Progress {
    what: String,
    bar: Option<ProgressBar>,
    began: Instant,
    said: Instant,
    /// Bytes at the beginning: an earlier part of a download, which says nothing about the speed now.
    from: Option<u64>,
    done: u64,
    total: Option<u64>,
}

impl Progress {
    /// `what` is the first word of each line.
    pub fn new(what: &str) -> Self {
        let bar = is_interactive().then(|| {
            let bar = ProgressBar::no_length().with_message(visible(what).into_owned());
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar
        });
        let now = Instant::now();
        let what = what.to_string();
        Self { what, bar, began: now, said: now, from: None, done: 0, total: None }
    }

    /// `done` bytes of `total`, if that is known, are there.
    pub fn set(&mut self, done: u64, total: Option<u64>) {
        let first = self.from.is_none();
        self.from.get_or_insert(done);
        (self.done, self.total) = (done, total);
        if let Some(bar) = &self.bar {
            if first {
                let known = total.is_some();
                bar.set_style(style(if known { OF_KNOWN_LENGTH } else { OF_UNKNOWN_LENGTH }));
                bar.set_position(done);
                bar.reset_eta();
            }
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(done);
        } else if self.said.elapsed() >= INTERVAL {
            self.said = Instant::now();
            say!("{}", self.line(self.began.elapsed()));
        }
    }

    /// A line of talk, above the bar where there is one.
    pub fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say!("{line}")),
            None => say!("{line}"),
        }
    }

    /// Ends the display with a plain line.
    pub fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.began.elapsed().as_secs_f64();
        say!("{}: {} in {seconds:.1} s", self.what, HumanBytes(self.done));
    }

    fn line(&self, elapsed: Duration) -> String {
        let (what, done) = (&self.what, HumanBytes(self.done));
        let gained = self.done - self.from.unwrap_or(0).min(self.done);
        let speed = gained as f64 / elapsed.as_secs_f64().max(1e-3);
        match self.total.filter(|_| speed > 0.0) {
            Some(total) => format!(
                "{what}: {done} of {} ({}/s, {:.0} s left)",
                HumanBytes(total),
                HumanBytes(speed as u64),
                total.saturating_sub(self.done) as f64 / speed
            ),
            None => format!("{what}: {done} ({}/s)", HumanBytes(speed as u64)),
        }
    }
}

impl Drop for Progress {
    /// Leaves no half bar behind when an error ends the work.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

const OF_KNOWN_LENGTH: &str =
    "{msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
const OF_UNKNOWN_LENGTH: &str = "{msg} {spinner} {bytes}, {bytes_per_sec}";

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar()) // they are well formed: see the tests
        .progress_chars("=> ")
}

/// Progress of something counted in files.
pub struct Files {
    what: &'static str,
    bar: Option<ProgressBar>,
    of: usize,
    said: Instant,
}

const OF_FILES: &str = "{prefix} [{bar:30}] {pos} of {len} files, {msg}, {elapsed}";

impl Files {
    /// `what` is the first word of each line.
    pub fn new(what: &'static str, of: usize) -> Self {
        let bar = is_interactive().then(|| {
            let bar = ProgressBar::new(of as u64).with_prefix(what);
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.set_style(style(OF_FILES));
            bar
        });
        Self { what, bar, of, said: Instant::now() }
    }

    /// So many files are there, and so many bytes of those and of others.
    pub fn set(&mut self, done: usize, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_message(HumanBytes(bytes).to_string());
            bar.set_position(done as u64);
        } else if self.said.elapsed() >= INTERVAL {
            self.said = Instant::now();
            say!("{}: {done} of {} files, {}", self.what, self.of, HumanBytes(bytes));
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Shows what a fetch tells.
#[derive(Default)]
pub struct Downloads(Option<Progress>);

impl Downloads {
    pub fn show(&mut self, event: FetchEvent) {
        match event {
            FetchEvent::Note(line) => match &self.0 {
                Some(progress) => progress.note(&line),
                None => say!("{line}"),
            },
            FetchEvent::Start { url } => {
                say!("fetching {}", public_url(&url));
                let name = url.rsplit('/').next().unwrap_or(&url);
                self.0 = Some(Progress::new(name));
            }
            FetchEvent::Progress { done, total } => {
                if let Some(progress) = &mut self.0 {
                    progress.set(done, total);
                }
            }
            FetchEvent::End => {
                if let Some(mut progress) = self.0.take() {
                    progress.finish();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_much_is_left() {
        let mut progress = Progress::new("linux.tar.xz");
        progress.set(1 << 20, Some(4 << 20));
        progress.set(2 << 20, Some(4 << 20));
        // One of the two megabytes came now, in two seconds: the other two take four.
        assert_eq!(
            progress.line(Duration::from_secs(2)),
            "linux.tar.xz: 2.00 MiB of 4.00 MiB (512.00 KiB/s, 4 s left)"
        );
    }

    #[test]
    fn the_templates_are_well_formed() {
        for template in [OF_KNOWN_LENGTH, OF_UNKNOWN_LENGTH, OF_FILES] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }
}
