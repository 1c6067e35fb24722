//! `afterimage completions` and `afterimage man`: what a package installs beside the program, made from its own
//! definitions, so that neither ever says something else than `--help`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::operator::failure::{Failure, Kind};
use crate::operator::output::line;
use crate::{Cli, operator};

/// Options of `afterimage completions`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    afterimage completions bash >/etc/bash_completion.d/afterimage\n  \
    afterimage completions zsh >/usr/local/share/zsh/site-functions/_afterimage\n  \
    afterimage completions fish >~/.config/fish/completions/afterimage.fish")]
pub struct Completions {
    /// Which shell.
    shell: Shell,
}

/// Options of `afterimage man`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    afterimage man /usr/local/share/man/man1 && man afterimage-group-create")]
pub struct Man {
    /// The folder, which has to be there.
    folder: PathBuf,
    /// Print JSON: {\"folder\",\"pages\":[…]}.
    #[arg(long)]
    json: bool,
}

/// Prints the completions of a shell.
pub fn completions(args: Completions) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "afterimage", &mut text);
    // A reader that has gone is no failure of ours.
    let _ = std::io::stdout().lock().write_all(&text);
    ExitCode::SUCCESS
}

/// Writes a page for each command.
pub fn man(args: Man) -> ExitCode {
    let mut pages = Vec::new();
    for (name, page) in all() {
        let path = args.folder.join(&name);
        if let Err(error) = std::fs::write(&path, page) {
            let failure = Failure::new(Kind::Failed, format!("page {}", path.display()), error.to_string());
            return operator::report(&failure.hint("name a folder that is there and can be written"), args.json);
        }
        pages.push(name);
    }
    let folder = args.folder.display().to_string();
    if args.json {
        line(&serde_json::json!({"folder": folder, "pages": pages}).to_string());
    } else {
        line(&format!("{} pages in {folder}", pages.len()));
    }
    ExitCode::SUCCESS
}

/// File name and text of every page.
fn all() -> Vec<(String, Vec<u8>)> {
    let mut pages = Vec::new();
    let mut top = Cli::command().disable_help_subcommand(true);
    top.build();
    add(&top, "afterimage", &mut pages);
    pages
}

fn add(command: &clap::Command, name: &str, pages: &mut Vec<(String, Vec<u8>)>) {
    let mut page = Vec::new();
    let named = command.clone().display_name(name.to_owned());
    clap_mangen::Man::new(named).title(name).render(&mut page).expect("a vector takes everything");
    pages.push((format!("{name}.1"), page));
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
        add(sub, &format!("{name}-{}", sub.get_name()), pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_its_examples() {
        let pages = all();
        let page = |name: &str| {
            let found = pages.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}"));
            String::from_utf8(found.1.clone()).unwrap()
        };
        for name in ["afterimage.1", "afterimage-group-create.1", "afterimage-rpo.1", "afterimage-coordinator.1"] {
            assert!(page(name).contains(".SH NAME"), "{name}");
        }
        assert!(page("afterimage-failover-start.1").contains("latest"), "the examples");
        assert!(page("afterimage-policy-create.1").contains("error\\-after"), "the options");
        assert!(pages.len() > 40, "{}", pages.len());
    }

    #[test]
    fn every_shell_completes_every_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::PowerShell, Shell::Elvish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "afterimage", &mut text);
            let text = String::from_utf8(text).unwrap();
            for word in ["failover", "rpo", "warn-after"] {
                assert!(text.contains(word), "{shell}: {word}");
            }
        }
    }
}
