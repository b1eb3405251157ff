//! A table of nftables, read on one host and loaded on another: two network namespaces.

use crate::namespaces::{Namespace, available};
use network::nft::{self, NftError, NftPattern, NftTable};

fn table(pattern: &str) -> NftTable {
    pattern.parse::<NftPattern>().unwrap().table("w")
}

/// What there is of everything that a table may hold.
const RULES: &str = r#"
    table inet mine {
        chain kept {
        }
    }
    table inet vmirror-w {
        counter c {
            packets 5 bytes 10
        }
        quota q {
            over 1 mbytes
        }
        limit l {
            rate 400/minute
        }
        ct helper h {
            type "ftp" protocol tcp
            l3proto ip
        }
        set s {
            type ipv4_addr
            flags interval
            elements = { 10.0.0.0/24, 10.0.2.1-10.0.2.9 }
        }
        map m {
            type ipv4_addr : verdict
            elements = { 10.0.0.2 : jump other }
        }
        chain other {
            counter name "c"
            quota name "q" drop
            limit name "l" accept
        }
        chain first {
            type filter hook forward priority -5; policy drop
            ct state vmap { established : accept, related : accept, invalid : drop }
            ip saddr vmap @m
            ip daddr @s counter packets 7 bytes 9 accept
            iifname "tap0" ether saddr != 52:54:00:12:34:56 log prefix "spoofed" drop
            ip6 saddr fd00::/8 tcp dport { 22, 80-90 } ct state new limit rate 5/second accept comment "hello"
            tcp dport 21 ct helper set "h"
        }
        chain nat {
            type nat hook prerouting priority dstnat; policy accept
            tcp dport 8080 dnat ip to 10.0.0.2:80
        }
    }
    "#;

#[test]
fn a_table_is_at_the_other_host_what_it_was_and_other_tables_are_left_alone() {
    if !available("a_table_is_at_the_other_host_what_it_was_and_other_tables_are_left_alone") {
        return;
    }
    let (a, b) = (Namespace::new(), Namespace::new());
    a.nft(RULES);
    b.nft("table inet vmirror-w {\n chain old {\n type filter hook input priority 0\n drop\n }\n}\ntable inet other {\n}\n");
    let table = table("vmirror-{vm}");
    let document = a.block_on(nft::export(&table)).unwrap().unwrap();
    assert!(!document.contains("mine"), "{document}");
    assert!(b.block_on(nft::load(&document, &table)).unwrap().is_empty());
    assert_eq!(listed(&b), listed(&a), "what was there before is gone");
    // Loading it once more adds nothing.
    assert!(b.block_on(nft::load(&document, &table)).unwrap().is_empty());
    assert_eq!(listed(&b), listed(&a));
    assert!(b.block_on(nft::export(&self::table("o{vm}"))).unwrap().is_none(), "no table ow");
    b.block_on(nft::remove(&table)).unwrap();
    b.block_on(nft::remove(&table)).unwrap();
    assert_eq!(b.block_on(nft::export(&table)).unwrap(), None);
    b.run("nft list table inet other");
}

#[test]
fn a_table_that_cannot_be_loaded_leaves_the_one_that_is_there() {
    if !available("a_table_that_cannot_be_loaded_leaves_the_one_that_is_there") {
        return;
    }
    let host = Namespace::new();
    let table = table("netdev vm-{vm}");
    host.nft(
        "table netdev vm-w {\n chain c {\n type filter hook ingress device lo priority 0\n counter\n }\n}\n",
    );
    let document = host.block_on(nft::export(&table)).unwrap().unwrap();
    let absent = document.replace("\"lo\"", "\"tap7\"");
    let error = host.block_on(nft::load(&absent, &table)).unwrap_err();
    assert!(matches!(&error, NftError::Failed { action: "write", .. }), "{error:?}");
    assert!(error.to_string().contains("netdev vm-w"), "{error}");
    assert_eq!(host.block_on(nft::export(&table)).unwrap(), Some(document));
}

#[test]
fn what_nft_loses_is_told() {
    if !available("what_nft_loses_is_told") {
        return;
    }
    let host = Namespace::new();
    let table = table("vmirror-{vm}");
    host.nft(
        "table inet vmirror-w {\n ct timeout t {\n protocol tcp\n l3proto ip\n policy = { established: 120 }\n }\n counter c {\n }\n}\n",
    );
    let before = listed(&host);
    let document = host.block_on(nft::export(&table)).unwrap().unwrap();
    let altered = host.block_on(nft::load(&document, &table)).unwrap();
    // A version of nft without that fault has lost nothing, and says so.
    if listed(&host) == before {
        assert!(altered.is_empty(), "{altered:?}");
    } else {
        assert_eq!(altered, ["ct timeout t"]);
    }
}

/// The table as a person sees it.
fn listed(host: &Namespace) -> String {
    host.within(|| {
        let output =
            std::process::Command::new("nft").args(["list", "table", "inet", "vmirror-w"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    })
}
