//! Against a driver that is not there, which answers as the kernel's does.

use std::collections::BTreeMap;

use afterimage_dataplane::io::ublk::uapi::SECTOR;

use super::*;

const OWN: u64 = 0x1234;
/// Linux 6.5; 6.12; 6.16; one that nobody has seen.
const KERNELS: [u64; 4] = [0xff, 0x3ff, 0x1fff, u64::MAX];

#[derive(Clone, Debug, Default)]
struct Made {
    info: DeviceInfo,
    params: Option<Params>,
    /// Queues of which all tags are fetched.
    ready: u16,
    /// A process has `/dev/ublkcN` open.
    served: bool,
    /// A host has `/dev/ublkbN` open.
    open: bool,
    deleted: bool,
    /// It was given to its owner.
    given: bool,
}

/// A driver, and what it was asked.
#[derive(Debug, Default)]
struct Driver {
    features: u64,
    all: BTreeMap<u32, Made>,
    asked: Vec<&'static str>,
    /// Looks after which udev gives a device to its owner; 0: none does.
    udev: usize,
    /// Looks after which the process of a device has ended.
    ends_after: usize,
}

impl Driver {
    fn new(features: u64) -> Self {
        Self { features, udev: 1, ..Self::default() }
    }

    fn numbers(&self) -> Vec<u32> {
        self.all.keys().copied().collect()
    }

    fn device(&mut self, number: u32) -> Result<&mut Made, Errno> {
        self.all.get_mut(&number).ok_or(Errno::NODEV)
    }

    /// As if a proxy had served it, whose process has gone now.
    fn left(&mut self, state: u16, mode: Mode) -> u32 {
        let info = self.add(device_info(u32::MAX, OWN, mode, self.features)).unwrap();
        let number = info.dev_id;
        self.set_params(number, params(&geometry(1 << 20))).unwrap();
        let made = self.device(number).unwrap();
        (made.info.state, made.ready, made.given) = (state, 1, true);
        self.asked.clear();
        number
    }

    fn find_or_make(&mut self, number: Option<u32>, mode: Mode) -> Result<Found, String> {
        let all = self.numbers();
        let sought = Sought { own: OWN, number, geometry: geometry(1 << 20), mode };
        let patience = Patience { take_over: WAIT, owner: WAIT, gone: WAIT };
        find_or_make(self, || all.clone(), &sought, patience)
    }
}

const WAIT: Duration = Duration::from_millis(200);

impl Commands for Driver {
    fn features(&self) -> u64 {
        self.features
    }

    fn add(&mut self, info: DeviceInfo) -> Result<DeviceInfo, Errno> {
        self.asked.push("add");
        let number = match info.dev_id {
            u32::MAX => (0..).find(|n| !self.all.contains_key(n)).unwrap(),
            number => number,
        };
        if self.all.contains_key(&number) {
            return Err(Errno::EXIST);
        }
        let recovery = feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE;
        let mut flags = info.flags;
        if flags & feature::UNPRIVILEGED_DEV != 0 {
            flags &= !recovery;
            if flags & feature::USER_COPY != 0 {
                return Err(Errno::INVAL);
            }
        }
        let flags = flags & self.features | feature::CMD_IOCTL_ENCODE;
        let info = DeviceInfo { dev_id: number, flags, state: state::DEAD, ..info };
        self.all.insert(number, Made { info, ..Made::default() });
        Ok(info)
    }

    fn info(&mut self, number: u32) -> Result<DeviceInfo, Errno> {
        let (udev, ends) = (self.udev, self.ends_after);
        if udev > 1 {
            self.udev -= 1;
        }
        let made = self.device(number)?;
        if made.info.flags & feature::UNPRIVILEGED_DEV != 0 && !made.given {
            made.given = udev == 1;
            return Err(Errno(13));
        }
        let info = made.info;
        if made.served && ends > 0 {
            self.ends_after -= 1;
            if self.ends_after == 0 {
                let made = self.device(number)?;
                made.served = false;
                made.info.state = match made.info.flags & feature::USER_RECOVERY {
                    0 => state::DEAD,
                    _ => state::QUIESCED,
                };
            }
        }
        Ok(info)
    }

    fn set_params(&mut self, number: u32, params: Params) -> Result<(), Errno> {
        self.asked.push("set_params");
        let made = self.device(number)?;
        let basic = params.basic;
        if basic.max_sectors > made.info.max_io_buf_bytes / 512 || basic.logical_bs_shift > 12 || basic.dev_sectors == 0
        {
            return Err(Errno::INVAL);
        }
        if params.discard.discard_granularity == 0 || params.discard.max_discard_segments != 1 {
            return Err(Errno::INVAL);
        }
        made.params = Some(params);
        Ok(())
    }

    fn params(&mut self, number: u32) -> Result<Params, Errno> {
        self.device(number)?.params.ok_or(Errno::INVAL)
    }

    fn start(&mut self, number: u32) -> Result<(), Errno> {
        self.device(number)?.info.state = state::LIVE;
        Ok(())
    }

    fn stop(&mut self, number: u32) -> Result<(), Errno> {
        self.asked.push("stop");
        let made = self.device(number)?;
        made.info.state = state::DEAD;
        Ok(())
    }

    fn delete(&mut self, number: u32) -> Result<(), Errno> {
        self.asked.push("delete");
        let made = self.device(number)?;
        made.deleted = true;
        if !made.open {
            self.all.remove(&number);
        }
        Ok(())
    }

    fn begin_recovery(&mut self, number: u32) -> Result<(), Errno> {
        self.asked.push("begin_recovery");
        let made = self.device(number)?;
        if made.info.flags & feature::USER_RECOVERY == 0 || made.ready == 0 {
            return Err(Errno::INVAL);
        }
        if made.served || !matches!(made.info.state, state::QUIESCED | state::FAIL_IO) {
            return Err(Errno::BUSY);
        }
        made.ready = 0;
        Ok(())
    }

    fn end_recovery(&mut self, number: u32) -> Result<(), Errno> {
        self.start(number)
    }

    fn update_size(&mut self, number: u32, size: u64) -> Result<(), Errno> {
        self.asked.push("update_size");
        let has = self.features & feature::UPDATE_SIZE != 0;
        let made = self.device(number)?;
        assert_eq!(made.info.state, state::LIVE, "before 7.0 the kernel would fall over this");
        match &mut made.params {
            Some(params) if has => params.basic.dev_sectors = size / SECTOR,
            _ => return Err(Errno(EOPNOTSUPP)),
        }
        Ok(())
    }
}

fn geometry(size: u64) -> Geometry {
    Geometry { size, block: 512, physical_block: 4096, read_only: false, discard: true, serial: String::new() }
}

#[test]
fn a_device_has_what_is_needed_and_nothing_that_the_driver_does_not_know() {
    for features in KERNELS {
        let mut driver = Driver::new(features);
        let found = driver.find_or_make(None, Mode::Full).unwrap();
        let flags = found.info.flags;
        assert_eq!(flags & needed(Mode::Full), needed(Mode::Full), "{features:#x}");
        assert_eq!((flags & !features, found.recovers), (0, false));
        // What changes how requests come is not asked for, whatever the driver has.
        let others = feature::SUPPORT_ZERO_COPY
            | feature::NEED_GET_DATA
            | feature::ZONED
            | feature::USER_RECOVERY_FAIL_IO
            | feature::UNPRIVILEGED_DEV;
        assert_eq!(flags & others, 0);
        assert_eq!(flags & feature::UPDATE_SIZE, features & feature::UPDATE_SIZE);
        assert!(flags >> 11 == 0, "features that came later are not ours to ask for: {flags:#x}");
    }
}

#[test]
fn a_driver_that_leaves_out_what_was_asked_for_is_not_used() {
    let mut driver = Driver::new(0xff & !feature::USER_RECOVERY_REISSUE);
    let why = driver.find_or_make(None, Mode::Full).unwrap_err();
    assert!(why.contains("0x10") && driver.all.is_empty(), "{why}: {driver:?}");
}

#[test]
fn a_number_is_kept_where_it_is_free() {
    let mut driver = Driver::new(KERNELS[1]);
    assert_eq!(driver.find_or_make(Some(7), Mode::Full).unwrap().info.dev_id, 7);
    driver.device(7).unwrap().info.ublksrv_flags = 1; // Somebody else's.
    let found = driver.find_or_make(Some(7), Mode::Full).unwrap();
    assert_eq!((found.info.dev_id, found.recovers), (0, false));
}

#[test]
fn a_device_that_waits_is_taken_over_when_its_process_has_ended() {
    for features in KERNELS {
        for state in [state::QUIESCED, state::FAIL_IO] {
            let mut driver = Driver::new(features);
            let number = driver.left(state, Mode::Full);
            let found = driver.find_or_make(None, Mode::Full).unwrap();
            assert_eq!((found.info.dev_id, found.recovers), (number, true));
            assert_eq!(found.params.basic.dev_sectors, (1 << 20) / SECTOR);
            assert_eq!(driver.asked, ["begin_recovery"]);
        }
    }
    let mut driver = Driver::new(KERNELS[1]);
    let number = driver.left(state::LIVE, Mode::Full);
    (driver.device(number).unwrap().served, driver.ends_after) = (true, 3);
    assert!(driver.find_or_make(None, Mode::Full).unwrap().recovers);
    // One that does not end is not waited for without end.
    let mut driver = Driver::new(KERNELS[1]);
    let number = driver.left(state::LIVE, Mode::Full);
    driver.device(number).unwrap().served = true;
    assert!(driver.find_or_make(None, Mode::Full).unwrap_err().contains("does not end"));
}

/// Begun to be taken over by a process that was killed before it had fetched anything: the driver has nothing then that
/// could be taken over a second time.
#[test]
fn a_process_killed_while_it_takes_a_device_over_leaves_it_to_the_next() {
    let mut driver = Driver::new(KERNELS[1]);
    let number = driver.left(state::QUIESCED, Mode::Full);
    assert!(driver.find_or_make(None, Mode::Full).unwrap().recovers);
    let found = driver.find_or_make(None, Mode::Full).unwrap();
    assert_eq!((found.info.dev_id, found.recovers), (number, true));
    assert_eq!(driver.all.len(), 1);
}

#[test]
fn a_device_that_has_ended_is_made_anew() {
    for mode in [Mode::Full, Mode::Unprivileged] {
        let mut driver = Driver::new(KERNELS[1]);
        let number = driver.left(state::DEAD, mode);
        let found = driver.find_or_make(Some(number), mode).unwrap();
        assert_eq!((found.info.dev_id, found.recovers), (number, false));
        assert_eq!(driver.asked, ["stop", "delete", "add", "set_params"]);
    }
}

#[test]
fn an_ordinary_user_waits_for_the_device_to_be_its_own() {
    for features in KERNELS {
        let mut driver = Driver::new(features);
        driver.udev = 3;
        let found = driver.find_or_make(None, Mode::Unprivileged).unwrap();
        let without = feature::USER_COPY | feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE;
        assert_eq!(found.info.flags & (feature::UNPRIVILEGED_DEV | without), feature::UNPRIVILEGED_DEV);
    }
    let mut driver = Driver::new(KERNELS[1]);
    driver.udev = 0;
    let why = driver.find_or_make(None, Mode::Unprivileged).unwrap_err();
    assert!(why.contains("udev"), "{why}");
}

#[test]
fn parameters_that_the_kernel_does_not_take_leave_no_device() {
    let mut driver = Driver::new(KERNELS[1]);
    let large = Geometry { block: 8192, physical_block: 8192, ..geometry(1 << 20) };
    let sought = Sought { own: OWN, number: None, geometry: large, mode: Mode::Full };
    let patience = Patience { take_over: WAIT, owner: WAIT, gone: WAIT };
    let why = find_or_make(&mut driver, Vec::new, &sought, patience).unwrap_err();
    assert!(why.contains("1048576") && driver.all.is_empty(), "{why}");
}

#[test]
fn hosts_hear_of_a_new_size_where_the_kernel_can_tell_them() {
    for features in KERNELS {
        let mut driver = Driver::new(features);
        let number = driver.left(state::QUIESCED, Mode::Full);
        if features & feature::UPDATE_SIZE == 0 {
            assert_eq!(resize(&mut driver, number, 2 << 20), Ok(Resized::Cannot));
            assert!(driver.asked.is_empty(), "a command is given that the driver does not know");
            continue;
        }
        // Not while nobody serves it.
        assert_eq!(resize(&mut driver, number, 2 << 20), Err(Errno::BUSY));
        driver.start(number).unwrap();
        assert_eq!(resize(&mut driver, number, 2 << 20), Ok(Resized::Done));
        assert_eq!(driver.params(number).unwrap().basic.dev_sectors, (2 << 20) / SECTOR);
        // The next process finds the new size.
        driver.device(number).unwrap().info.state = state::QUIESCED;
        assert_eq!(driver.find_or_make(None, Mode::Full).unwrap().params.basic.dev_sectors, (2 << 20) / SECTOR);
    }
}

#[test]
fn an_end_does_not_wait_for_who_holds_a_device_open() {
    let mut driver = Driver::new(KERNELS[1]);
    let number = driver.left(state::LIVE, Mode::Full);
    driver.device(number).unwrap().open = true;
    assert_eq!(remove(&mut driver, number, WAIT), Ok(false));
    driver.all.remove(&number);
    assert_eq!(remove(&mut driver, number, WAIT), Ok(true));
}
