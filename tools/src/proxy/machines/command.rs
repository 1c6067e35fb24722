//! A program of the host's: what it is given, how long it may take, what it said.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{DriveError, short};

/// The exit code for "no": not yet.
const NO: i32 = 3;
/// Between two looks whether it has ended.
const POLL: Duration = Duration::from_millis(20);
/// Most that is read of what it said, bytes.
const MAX_SAID: u64 = 64 * 1024;

/// How a program ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ran {
    /// Its exit code; none if it was killed, by its deadline or otherwise.
    pub code: Option<i32>,
    /// It was killed because its time was over.
    pub late: bool,
    /// On standard output and standard error.
    pub said: String,
}

/// Runs a program to its end, or kills it with all that it has started.
///
/// What it leaves running behind it is left alone, and not waited for: its output goes to a file, not to a pipe.
///
/// # Errors
/// It cannot be started.
pub fn run(words: &[String], input: &[u8], variables: &[(&str, String)], deadline: Duration) -> io::Result<Ran> {
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut given = tempfile::tempfile()?;
    given.write_all(input)?;
    given.seek(SeekFrom::Start(0))?;
    let mut output = tempfile::tempfile()?;
    let mut child = Command::new(program)
        .args(arguments)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::from(given))
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(output.try_clone()?))
        .current_dir("/")
        .process_group(0)
        .spawn()?;
    let end = Instant::now() + deadline;
    let mut late = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= end {
            late = true;
            if let Some(group) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
            break child.wait()?;
        }
        std::thread::sleep(POLL);
    };
    let mut said = Vec::new();
    output.seek(SeekFrom::Start(0))?;
    output.take(MAX_SAID).read_to_end(&mut said)?;
    Ok(Ran { code: status.code(), late, said: String::from_utf8_lossy(&said).trim().to_owned() })
}

/// Whether a command of the operator's says yes (0) or no (3), and what it said. `name` is what messages call it.
///
/// # Errors
/// It says neither: it could not be started, took too long, or has failed.
pub fn ask(
    name: &str,
    words: &[String],
    input: &[u8],
    variables: &[(&str, String)],
    deadline: Duration,
) -> Result<(bool, String), DriveError> {
    let program = words.first().map_or("", String::as_str);
    let ran = run(words, input, variables, deadline)
        .map_err(|error| DriveError::failed(format!("{name} ({program}) cannot be started: {error}")))?;
    let said = short(&ran.said);
    match ran.code {
        Some(0) => Ok((true, said)),
        Some(NO) => Ok((false, said)),
        _ if ran.late => {
            Err(DriveError::failed(format!("{name} was not done within {} s: {said}", deadline.as_secs_f32())))
        }
        Some(code) => Err(DriveError::failed(format!("{name} ended with {code}: {said}"))),
        None => Err(DriveError::failed(format!("{name} was killed: {said}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, input: &[u8], deadline: Duration) -> Ran {
        let words = ["/bin/sh", "-c", script].map(str::to_owned);
        run(&words, input, &[("COLOUR", "red".to_owned())], deadline).unwrap()
    }

    #[test]
    fn it_gets_input_and_variables_and_its_code_and_words_come_back() {
        let ran = shell("cat; echo $COLOUR >&2; exit 3", b"in\n", Duration::from_secs(10));
        assert_eq!(ran, Ran { code: Some(3), late: false, said: "in\nred".into() });
    }

    #[test]
    fn one_that_takes_too_long_is_killed_with_what_it_started() {
        let begun = Instant::now();
        let ran = shell("sleep 60 & echo begun; sleep 60", b"", Duration::from_millis(200));
        assert_eq!((ran.code, ran.late, ran.said.as_str()), (None, true, "begun"));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_it_leaves_running_is_not_waited_for() {
        let begun = Instant::now();
        let ran = shell("sleep 3 & echo done", b"", Duration::from_secs(30));
        assert_eq!((ran.code, ran.said.as_str()), (Some(0), "done"));
        assert!(begun.elapsed() < Duration::from_millis(2500));
    }

    #[test]
    fn one_that_is_not_there_is_an_error() {
        assert!(run(&["/nowhere/at/all".to_owned()], b"", &[], Duration::from_secs(1)).is_err());
    }
}
