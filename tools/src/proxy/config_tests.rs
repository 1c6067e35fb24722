use super::*;

fn load(text: &str, args: &Args) -> Result<Config, String> {
    let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
    Config::merge(file, args).map_err(|e| e.to_string())
}

const SOURCE: &str = "name='s'\nstate_dir='/s'\n[coordinator]\naddress='h:1'\n[source]\nnbd=['unix:/n']\n";

#[test]
fn a_misspelt_field_is_named_with_what_is_allowed() {
    let error = load(&format!("{SOURCE}memroy='1G'\n"), &Args::default()).unwrap_err();
    assert!(error.contains("memroy") && error.contains("`memory`"), "{error}");
}

#[test]
fn a_value_out_of_range_is_named_with_its_field_and_the_range() {
    let error = load(&format!("{SOURCE}memory='1MiB'\n"), &Args::default()).unwrap_err();
    assert_eq!(error, format!("`source.memory` is 1048576: allowed is {MIN_POOL} to {MAX_POOL}"));
}

#[test]
fn the_speed_of_synchronisations_has_a_least_bound_and_none_by_default() {
    let rate = |text: &str| load(&format!("{SOURCE}{text}"), &Args::default());
    assert_eq!(rate("").unwrap().source.unwrap().sync_rate, 0);
    assert_eq!(rate("sync_rate='50MiB'\n").unwrap().source.unwrap().sync_rate, 50 * MIB);
    assert!(rate("sync_rate='1K'\n").unwrap_err().starts_with("`source.sync_rate` is 1024: allowed is 65536"));
}

#[test]
fn a_bad_listen_address_is_named() {
    let error = load("[source]\nnbd=['/n']\n", &Args::default()).unwrap_err();
    assert!(error.contains("`/n`: allowed is unix:/absolute/path or tcp:address:port"), "{error}");
}

#[test]
fn a_flag_wins_over_the_file() {
    let args = Args { name: Some("other".into()), ..Args::default() };
    assert_eq!(load(SOURCE, &args).unwrap().name, "other");
}

#[test]
fn a_proxy_without_a_role_is_refused() {
    let error = load("name='s'\nstate_dir='/s'\n[coordinator]\naddress='h:1'\n", &Args::default()).unwrap_err();
    assert!(error.contains("--nbd") && error.contains("--journal"), "{error}");
}

#[test]
fn the_spill_lies_in_the_state_folder_unless_told_and_can_be_turned_off() {
    let spill = |text: &str| load(&format!("{SOURCE}{text}"), &Args::default()).map(|c| c.source.unwrap().spill);
    assert_eq!(spill("").unwrap().unwrap().dir, Path::new("/s/spill"));
    assert_eq!(spill("spill='/x'").unwrap().unwrap().dir, Path::new("/x"));
    assert_eq!(spill("spill_budget=0").unwrap(), None);
    assert!(spill("spill_budget='1MiB'").unwrap_err().contains("source.spill_budget"));
    assert!(spill("spill_segment='1MiB'").unwrap_err().contains("source.spill_segment"));
    assert!(spill("spill_segment=4194305").unwrap_err().contains("a multiple of 4096"));
    assert!(spill("spill='x'").unwrap_err().contains("`source.spill` is `x`"));
}

#[test]
fn a_target_on_any_address_must_advertise_one() {
    let text = "name='t'\nstate_dir='/s'\n[coordinator]\naddress='h:1'\n[target]\njournal='/j'\nlisten='0.0.0.0:1'\n";
    assert!(load(text, &Args::default()).unwrap_err().contains("target.advertise"));
    assert!(load(&format!("{text}advertise='a:1'\n"), &Args::default()).is_ok());
}

#[test]
fn sizes_have_units() {
    assert_eq!("256MiB".parse(), Ok(Size(256 * MIB)));
    assert_eq!("1g".parse(), Ok(Size(1024 * MIB)));
    assert_eq!("17".parse(), Ok(Size(17)));
    assert!("1.5G".parse::<Size>().is_err());
    assert!("99999999999T".parse::<Size>().is_err());
}

#[test]
fn a_token_is_never_printed() {
    let args = Args { token: Some(Secret("hush".into())), ..Args::default() };
    let config = load(SOURCE, &args).unwrap();
    assert!(!format!("{config:?} {args:?}").contains("hush"));
}

#[test]
fn machines_are_driven_by_what_this_host_names_and_by_absolute_paths() {
    let machines = |text: &str| load(&format!("{SOURCE}[machines]\n{text}"), &Args::default()).map(|c| c.machines);
    assert_eq!(machines("").unwrap(), Machines::default());
    let hook = "hook.web = { start = ['/a', 'on'], stop = ['/a', 'off'], probe = ['/a'] }\n";
    let made = machines(&format!("{hook}qemu.default = {{}}")).unwrap();
    assert_eq!(made.hooks["web"].deadline, std::time::Duration::from_secs(machines::DEFAULT_HOOK_S));
    assert_eq!(made.capabilities().collect::<Vec<_>>(), ["machine-hook", "machine-qemu", "machine-check"]);
    assert_eq!(made.qemu["default"].accelerators, ["kvm", "tcg"]);
    assert!(machines(&hook.replace("'/a', 'on'", "'a'")).unwrap_err().contains("`machines.hook.start`"));
    assert!(machines(&hook.replace("'/a', 'on'", "")).unwrap_err().contains("an absolute path"));
    assert!(machines("hook.web = { start = ['/a'] }").unwrap_err().contains("stop"));
    assert!(machines(&hook.replace("web", "Web")).unwrap_err().contains("`Web`"));
    assert!(machines(&hook.replace(" }", ", deadline_s = 0 }")).unwrap_err().contains("1 to 3600"));
}
