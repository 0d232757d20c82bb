//! Two hosts: network namespaces with a cable between them. They share this machine's processors
//! and disk; what workers tell each other goes over the cable.

use std::os::unix::fs::PermissionsExt;

use super::*;

/// Their addresses.
const ADDRESSES: [&str; 2] = ["10.77.0.1", "10.77.0.2"];

/// Removed when it is dropped.
struct Hosts {
    names: [String; 2],
    /// What the launcher starts a command on another host by, in `ssh`'s place.
    remote: PathBuf,
}

fn ip(arguments: &str) -> bool {
    let ran = Command::new("ip").args(arguments.split(' ')).output();
    ran.is_ok_and(|ran| ran.status.success())
}

impl Hosts {
    /// None where this user may not make any, or no cable between them.
    fn new(folder: &Path) -> Option<Self> {
        let process = std::process::id();
        let names = ["a", "b"].map(|host| format!("tf{process}{host}"));
        let [a, b] = &names;
        let remote = folder.join("remote");
        let hosts = Self {
            names: names.clone(),
            remote: remote.clone(),
        };
        if !(ip(&format!("netns add {a}")) && ip(&format!("netns add {b}"))) {
            return None;
        }
        let cable = format!("link add {a} netns {a} type veth peer name {b} netns {b}");
        if !ip(&cable) {
            return None;
        }
        for (name, address) in names.iter().zip(ADDRESSES) {
            assert!(ip(&format!("-n {name} addr add {address}/24 dev {name}")));
            assert!(ip(&format!("-n {name} link set {name} up")));
            assert!(ip(&format!("-n {name} link set lo up")));
        }
        // A link comes up some time after it is set up, and UCX leaves out one that is down.
        let up = |name: &String| {
            let link = ["-n", name, "link", "show", name];
            let shown = Command::new("ip").args(link).output().unwrap();
            text(&shown).contains("state UP")
        };
        let begun = std::time::Instant::now();
        while !names.iter().all(up) {
            if begun.elapsed().as_secs() > 60 {
                return None;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        // Called as `remote -x ADDRESS COMMAND ...`.
        let [first, _] = ADDRESSES;
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = -x ] && shift\n[ \"$1\" = {first} ] && host={a} || host={b}\nshift\n\
             exec ip netns exec $host sh -c \"$*\"\n"
        );
        std::fs::write(&remote, script).unwrap();
        std::fs::set_permissions(&remote, std::fs::Permissions::from_mode(0o755)).unwrap();
        Some(hosts)
    }

    /// Bytes that the first host has sent over the cable.
    fn sent(&self) -> u64 {
        let [name, _] = &self.names;
        let path = format!("/sys/class/net/{name}/statistics/tx_bytes");
        let read = Command::new("ip")
            .args(["netns", "exec", name, "cat", &path])
            .output()
            .unwrap();
        text(&read).trim().parse().unwrap()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&format!("netns del {name}"));
        }
    }
}

#[test]
fn two_hosts_leave_the_files_of_one() {
    let place = Place::new(6);
    let Some(hosts) = Hosts::new(place.0.path()) else {
        eprintln!("no network namespaces with a cable can be made here: two hosts are not tried");
        return;
    };
    succeeded(&place.run(1, &["--runs", "1"]));
    let [a, b] = ADDRESSES;
    // Without `UCX_TLS`, processes of one machine find each other's memory.
    let mut command = Command::new("ip");
    command
        .args([
            "netns",
            "exec",
            &hosts.names[0],
            "timeout",
            "300",
            "mpiexec",
        ])
        .args(["-genv", "UCX_TLS", "tcp,self", "-launcher", "ssh"])
        .arg("-launcher-exec")
        .arg(&hosts.remote)
        .args(["-hosts", &format!("{a}:2,{b}:2"), "-n", "4"])
        .args([env!("CARGO_BIN_EXE_tinyfusion"), "recipe", "job.toml"])
        .args(["--threads", "1", "--plain", "--runs", "hosts"])
        .current_dir(place.0.path())
        .env("TMPDIR", place.0.path().join("tmp"))
        .stdin(Stdio::null());
    // UCX does not always find the link; nothing of this program has run by then.
    let lost = "no active messages transport";
    let mut launches = (0..3).map(|_| command.output().unwrap());
    let Some(launched) = launches.find(|launched| !text(launched).contains(lost)) else {
        eprintln!(
            "MPI does not start over a cable between network namespaces here: two hosts are not tried"
        );
        return;
    };
    succeeded(&launched);
    same(&place.path("1"), &place.path("hosts"), "two hosts");
    // At least one worker's gradients of each step.
    let model = std::fs::metadata(place.path("hosts").join("01-teacher/model.safetensors"));
    assert!(hosts.sent() > 6 * model.unwrap().len());
}
