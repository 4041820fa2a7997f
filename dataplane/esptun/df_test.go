package esptun

import (
	"encoding/binary"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// ESP packets over IPv4 may be fragmented on their way.
func TestNoDontFragment(t *testing.T) {
	w := newWorld(t)
	p := w.newPhone(1, false, gcm)
	p.install(t)
	pc := udp(t, w.gm.Hidden(), p.gm, portPC)
	us := udp(t, w.ue.Hidden(), p.addr, portUS)
	send(t, pc, strings.Repeat("x", 1400), p.sas[2].Dst)
	if _, err := us.Read(make([]byte, 2000)); err != nil {
		t.Fatal(err)
	}
	const protoESP, flagDF = 50, 0x4000
	seen := 0
	buf := make([]byte, 65536)
	for {
		n, _, err := unix.Recvfrom(w.frames, buf, 0)
		if err != nil {
			break // no more frames
		}
		if n > 20 && buf[0]>>4 == 4 && buf[9] == protoESP {
			seen++
			if binary.BigEndian.Uint16(buf[6:])&flagDF != 0 {
				t.Error("an ESP packet forbids its fragmentation")
			}
		}
	}
	if seen == 0 {
		t.Error("no ESP packet seen")
	}
}
