//! Writes what the corpus of this target begins with: command lines as management programs have them.

use fuzzing::Seeds;

const LINES: &[(&str, &str)] = &[
    ("first-try", "qemu-system-x86_64 -enable-kvm -m 2G -cdrom debian.iso disk.img"),
    (
        "script",
        "/usr/bin/qemu-system-x86_64 -M q35,accel=kvm:tcg -cpu host,-vmx -smp sockets=1,cores=4,threads=2 -m 4096 -drive file=/vm/a.qcow2,if=virtio,cache=none,aio=native -netdev tap,id=n,ifname=tap0,script=no,downscript=no -device virtio-net-pci,netdev=n,mac=52:54:00:aa:bb:cc -display none -daemonize -pidfile /run/a.pid -qmp unix:/run/a.qmp,server,nowait -monitor unix:/run/a.mon,server,nowait -serial file:/var/log/a.log",
    ),
    (
        "libvirt",
        r#"/usr/bin/qemu-system-x86_64 -name guest=web,debug-threads=on -S -object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/k.aes"} -machine pc-q35-7.2,usb=off,memory-backend=pc.ram -accel kvm -m size=4194304k -object {"qom-type":"memory-backend-ram","id":"pc.ram","size":4294967296} -overcommit mem-lock=off -smp 2,sockets=2,cores=1,threads=1 -nodefaults -chardev socket,id=charmonitor,path=/m,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control -global kvm-pit.lost_tick_policy=delay -boot strict=on -device {"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"} -blockdev {"driver":"file","filename":"/i/web.qcow2","node-name":"s","auto-read-only":true,"discard":"unmap"} -blockdev {"node-name":"f","read-only":false,"driver":"qcow2","file":"s","backing":null} -device {"driver":"virtio-blk-pci","drive":"f","id":"virtio-disk0","bootindex":1} -netdev {"type":"tap","ifname":"vnet0","vhost":true,"id":"hostnet0"} -device {"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:11:22:33"} -sandbox on,obsolete=deny"#,
    ),
    (
        "mirrored",
        "/opt/qemu -machine pc-q35-7.2,accel=tcg,memory-backend=pc.ram -object memory-backend-file,id=pc.ram,size=64M,share=on,mem-path=/dev/shm/vmirror-x@pc.ram -nodefaults -chardev socket,id=vmirror-qmp,path=/run/q,server=on,wait=off -mon chardev=vmirror-qmp,mode=control -incoming defer -S",
    ),
    (
        "numa",
        r#"q -m 2G -object {"qom-type":"memory-backend-memfd","id":"n0","size":1073741824} -object memory-backend-file,id=n1,size=1G,share=on,mem-path=/dev/shm/n1,offset=4k -numa node,memdev=n0 -numa node,memdev=n1 -mem-path /dev/hugepages -mem-prealloc"#,
    ),
    (
        "odds",
        r#"q --m 0.5G,slots=2,maxmem=4G -drive file=a,,b.img,format=raw,snapshot=off -drive file.driver=nbd,file.host=x,if=none -drive json:{"driver":"raw"} -fda f -nic bridge,br=lan,model=e1000 -net nic -net user,hostfwd=tcp::22-:22 -chardev file,id=c,path=/c,logfile=/l -serial chardev:c -fw_cfg name=opt/x,file=/y -virtfs local,path=/p,mount_tag=t,security_model=none -acpitable file=/a -smbios file=/s -option-rom r -kernel k -initrd i -append root=/dev/vda,x -pflash p -drive if=pflash,file=/o,readonly=on -tpmdev passthrough,id=t -vnc :1 -spice port=5900 -loadvm s -incoming tcp:0:4444 -unknown"#,
    ),
];

fn main() {
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "command_line");
    for (name, line) in LINES {
        seeds.add(name, line.replace(' ', "\n"));
    }
}
