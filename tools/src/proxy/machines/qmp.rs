//! The monitor of a machine (QMP): one command at a time, events passed over.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// How long the monitor may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Lines that may come before an answer: events.
const MAX_LINES: usize = 10_000;

/// A connection to a monitor.
pub struct Monitor {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Monitor {
    /// Connects and leaves the greeting behind.
    ///
    /// # Errors
    /// Nobody listens, or what does is no monitor.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let writer = UnixStream::connect(path)?;
        writer.set_read_timeout(Some(ANSWER))?;
        writer.set_write_timeout(Some(ANSWER))?;
        let mut monitor = Self { reader: BufReader::new(writer.try_clone()?), writer };
        let greeting = monitor.line()?;
        if greeting.get("QMP").is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no greeting of a monitor"));
        }
        monitor.ask("qmp_capabilities")?;
        Ok(monitor)
    }

    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Gives a command without arguments; what it returns.
    ///
    /// # Errors
    /// The monitor refuses it, or has ended.
    pub fn ask(&mut self, command: &str) -> io::Result<Value> {
        self.ask_with(command, json!({}))
    }

    /// Gives a command; what it returns.
    ///
    /// # Errors
    /// The monitor refuses it, or has ended.
    pub fn ask_with(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.writer.write_all(line.as_bytes())?;
        for _ in 0..MAX_LINES {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                let text = error.get("desc").and_then(Value::as_str).unwrap_or("it is refused");
                return Err(io::Error::other(format!("{command}: {text}")));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "events without an end"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn events_are_passed_over_and_refusals_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            stream.write_all(b"{\"QMP\": {}}\n").unwrap();
            for answer in [
                "{\"return\": {}}\n",
                "{\"event\": \"POWERDOWN\"}\n{\"return\": {\"status\": \"running\"}}\n",
                "{\"error\": {\"desc\": \"not now\"}}\n",
            ] {
                lines.read_line(&mut String::new()).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut monitor = Monitor::connect(&path).unwrap();
        assert_eq!(monitor.ask("query-status").unwrap()["status"], "running");
        assert_eq!(monitor.ask("quit").unwrap_err().to_string(), "quit: not now");
        server.join().unwrap();
        assert!(Monitor::connect(&path).is_err(), "nobody listens any more");
    }
}
