package guard

import (
	"math"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/gmgate/gmgate/bpf"
)

// TestLoops refuses programs that Linux before 6.8 would refuse to load, and newer kernels take: loops that are closed by
// anything but a jump, which is what a compiler makes of a loop that it turns around.
func TestLoops(t *testing.T) {
	guard, err := bpf.LoadGuard()
	if err != nil {
		t.Fatal(err)
	}
	steer, err := bpf.LoadSteer()
	if err != nil {
		t.Fatal(err)
	}
	for _, spec := range []*ebpf.CollectionSpec{guard, steer} {
		for name, p := range spec.Programs {
			if from := fallenInto(p.Instructions); from >= 0 {
				t.Errorf("%s: instruction %d falls into the head of the loop that it is in:\n%v", name, from, p.Instructions[max(from-3, 0):from+3])
			}
		}
	}
}

// TestWithoutXFRM loads what a kernel without XFRM is given: it does not call what such a kernel does not have, and drops what
// is in clear.
func TestWithoutXFRM(t *testing.T) {
	needBPF(t)
	spec, err := bpf.LoadGuard()
	if err != nil {
		t.Fatal(err)
	}
	calls := func() (n int) {
		for _, p := range spec.Programs {
			for _, in := range p.Instructions {
				if in.IsBuiltinCall() && asm.BuiltinFunc(in.Constant) == asm.FnSkbGetXfrmState {
					n++
				}
			}
		}
		return n
	}
	if n := calls(); n != 2 {
		t.Errorf("%d calls, want one of each tc program", n)
	}
	withoutXFRM(spec)
	if n := calls(); n != 0 {
		t.Errorf("%d calls are left", n)
	}
	c := testConfig()
	must(t, c.complete())
	must(t, (&Guard{cfg: c}).configure(spec))
	var objs bpf.GuardObjects
	must(t, spec.LoadAndAssign(&objs, nil))
	defer objs.Close() //nolint:errcheck // of a test
	for packet, want := range map[string]uint32{
		string(inFrame(ip(phone4, local4, protoUDP, udp(31000, portPS, []byte(options))))): 2,
		string(inFrame(ip(phone4, local4, protoUDP, udp(31000, otherPort, nil)))):          math.MaxUint32,
	} {
		got, err := objs.GuardTc.Run(&ebpf.RunOptions{Data: []byte(packet)})
		if err != nil || got != want {
			t.Errorf("verdict %d, want %d: %v", int32(got), int32(want), err) //nolint:gosec // TC_ACT_UNSPEC is -1
		}
	}
}

// fallenInto walks through the instructions in the order of check_cfg in the kernel's verifier, and returns the first one
// that is no jump and leads to one on the way to it; -1: there is none.
func fallenInto(code asm.Instructions) int {
	labels, raw := make(map[string]int), make(map[asm.RawInstructionOffset]int)
	places := make([]asm.RawInstructionOffset, len(code))
	for it := code.Iterate(); it.Next(); {
		if s := it.Ins.Symbol(); s != "" {
			labels[s] = it.Index
		}
		raw[it.Offset], places[it.Index] = it.Index, it.Offset
	}
	target := func(i int) int {
		if to, ok := labels[code[i].Reference()]; ok {
			return to
		}
		return raw[places[i]+1+asm.RawInstructionOffset(code[i].Offset)] // what a compiler has resolved
	}
	const underway, done = 1, 2
	state := make([]int, len(code))
	var visit func(i int) int
	// next follows an edge; loops say whether it may go back.
	next := func(from, to int, loops bool) int {
		switch {
		case state[to] == 0:
			return visit(to)
		case state[to] == underway && !loops:
			return from
		}
		return -1
	}
	visit = func(i int) int {
		state[i] = underway
		type edge struct {
			to    int
			loops bool
		}
		var edges []edge
		in := code[i]
		op := in.OpCode.JumpOp()
		switch {
		case op == asm.Exit:
		case op == asm.Ja:
			edges = []edge{{target(i), true}}
		case op == asm.Call && in.IsFunctionCall():
			edges = []edge{{i + 1, false}, {target(i), false}}
		case op == asm.InvalidJumpOp || op == asm.Call:
			edges = []edge{{i + 1, false}}
		default:
			edges = []edge{{i + 1, true}, {target(i), true}}
		}
		for _, e := range edges {
			if bad := next(i, e.to, e.loops); bad >= 0 {
				return bad
			}
		}
		state[i] = done
		return -1
	}
	return visit(0)
}

// TestFallenInto has a loop of either kind.
func TestFallenInto(t *testing.T) {
	end := asm.Instructions{asm.Mov.Imm(asm.R0, 0).WithSymbol("end"), asm.Return()}
	closed := asm.Instructions{
		asm.Mov.Imm(asm.R1, 3).WithSymbol("start"),
		asm.Sub.Imm(asm.R1, 1).WithSymbol("head"),
		asm.JEq.Imm(asm.R1, 0, "end"),
		asm.Ja.Label("head"),
	}
	turned := asm.Instructions{
		asm.Mov.Imm(asm.R1, 3).WithSymbol("start"),
		asm.Ja.Label("head"),
		asm.Sub.Imm(asm.R1, 1).WithSymbol("body"),
		asm.JNE.Imm(asm.R1, 0, "body").WithSymbol("head"),
	}
	if got := fallenInto(slices.Concat(closed, end)); got != -1 {
		t.Errorf("a loop that a jump closes: %d", got)
	}
	if got := fallenInto(slices.Concat(turned, end)); got != 2 {
		t.Errorf("a loop that is turned around: %d, want 2", got)
	}
}
