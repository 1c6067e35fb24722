//! Examples for `afterimage proxy --help`.

/// Behind the options.
pub const EXAMPLES: &str = "\
Examples:
  A source: hosts reach their disks by NBD on a Unix socket
    afterimage proxy --name src-1 --coordinator 10.0.0.5:7700 --token-file /root/token \\
        --state /var/lib/afterimage/proxy --nbd unix:/run/afterimage/nbd.sock

  A target: journals under /srv/journal, streams on port 7800, views on a second socket
    afterimage proxy --name tgt-1 --coordinator 10.0.0.5:7700 --token-file /root/token \\
        --state /var/lib/afterimage/proxy --journal /srv/journal --listen 10.0.0.6:7800 \\
        --views unix:/run/afterimage/views.sock

  All of it from a file
    afterimage proxy --config /etc/afterimage/proxy.toml

  One raw disk over NBD, unprotected, without a coordinator
    afterimage proxy --serve disk=/srv/disk.raw --nbd unix:/run/disk.sock

  A pair without a coordinator: make its files, then run both ends
    afterimage proxy --new-pair /etc/pair --serve disk=/srv/disk.raw --listen 127.0.0.1:7800
    afterimage proxy --standalone /etc/pair/target.toml --journal /srv/journal --listen 127.0.0.1:7800
    afterimage proxy --standalone /etc/pair/source.toml --nbd unix:/run/disk.sock

The file: `afterimage init source` and `afterimage init target` write one, with every setting, what it is for, and its
default.";
