package xfrm

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// Why the kernel cannot serve, as found by errors.Is in the errors of New and Support.Err.
var (
	ErrNoXFRM      = errors.New("kernel has no XFRM netlink interface")
	ErrNoESP       = errors.New("kernel has no ESP")
	ErrNoAlgorithm = errors.New("kernel lacks the algorithm")
	ErrPermission  = errors.New("CAP_NET_ADMIN is missing")
)

// Missing is an algorithm pair which the kernel cannot do, and why.
type Missing struct {
	Suite ims.Suite
	Err   error // wraps one of the Err variables and the errno
}

// Support says what the kernel's ESP can do.
type Support struct {
	V4, V6      bool        // ESP exists for the address family
	Suites      []ims.Suite // pairs that work, in the order of ims.Suites
	Missing     []Missing   // pairs that do not
	LargeWindow bool        // replay windows of more than 32 packets work
	Reason      string      // all of it in one line for the log

	err error
}

// Err returns nil when at least one pair works for at least one family, and otherwise why none does.
func (s *Support) Err() error { return s.err }

// LogValue implements slog.LogValuer.
func (s *Support) LogValue() slog.Value { return slog.StringValue(s.Reason) }

// Probe finds out what the kernel can do in a namespace (nil: the process's) by adding and deleting a state per
// algorithm pair and family; nothing less tells, because the kernel loads its modules on demand. The states are for
// documentation addresses (RFC 5737, RFC 3849) and meet no traffic.
func Probe(ns *hostnet.NS) Support {
	s, err := openSocket(ns)
	if err != nil {
		return Unsupported(classify(err))
	}
	defer func() { _ = s.close() }()
	return probe(newConn(s))
}

// Unsupported is the Support of a kernel that cannot do ESP at all; err says why.
func Unsupported(err error) Support { return Support{Reason: err.Error(), err: err} }

// probeFamily is a pair of addresses of one family.
type probeFamily struct{ src, dst netip.Addr }

var probeFamilies = [2]probeFamily{
	{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")},
	{netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")},
}

// probeLife removes the dummy states should this process die in between.
const probeLife = 60 * time.Second

// probe adds one state per family and pair, plus one per family with a large replay window, and deletes them.
func probe(c *conn) Support {
	suites := ims.Suites()
	plain := ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}
	perFamily := len(suites) + 1
	ids := make([]stateID, 0, len(probeFamilies)*perFamily)
	spi := ims.MinSPI + ims.SPI(rand.Uint32N(1<<31)) //nolint:gosec // only to miss what others have

	c.reset()
	for _, f := range probeFamilies {
		for i := range perFamily {
			suite, window := plain, 2*legacyWindow
			if i < len(suites) {
				suite, window = suites[i], legacyWindow
			}
			keys := blankKeys(suite)
			// Not all zero: in FIPS mode 3DES with equal parts is refused for its key, not for being absent.
			for j := range keys.Enc {
				keys.Enc[j] = byte(j)
			}
			id := stateID{dst: f.dst, spi: spi}
			spi++
			err := c.state(nl.XFRM_MSG_NEWSA, &state{
				sa:   sa.SA{SPI: id.spi, Src: netip.AddrPortFrom(f.src, 9), Dst: netip.AddrPortFrom(f.dst, 9)},
				keys: &keys, reqid: 0, window: window, life: lifetimeOf(0, probeLife),
			})
			if err != nil { // the tables of this package disagree with each other
				return Unsupported(err)
			}
			ids = append(ids, id)
		}
	}
	results := append([]error(nil), c.run()...)

	var added []stateID
	for i, err := range results {
		if err == nil {
			added = append(added, ids[i])
		}
		if errors.Is(err, unix.EEXIST) { // somebody has this very SPI: the algorithms were set up before that was found
			results[i] = nil
		}
	}
	if _, err := c.removeStates(added); err != nil {
		return Unsupported(fmt.Errorf("remove the states of the probe: %w", err))
	}
	return judge(suites, results)
}

// judge draws the conclusions from the results of probe: per family one for each pair and one for the large window.
func judge(suites []ims.Suite, results []error) Support {
	var s Support
	n := len(suites) + 1
	byFamily := [2][]error{results[:n], results[n:]}
	for f, rs := range byFamily {
		for _, err := range rs[:len(suites)] {
			if err == nil && f == 0 {
				s.V4 = true
			} else if err == nil {
				s.V6 = true
			}
		}
	}
	has := [2]bool{s.V4, s.V6}
	s.LargeWindow = s.V4 || s.V6
	for f, rs := range byFamily {
		if has[f] && rs[len(suites)] != nil {
			s.LargeWindow = false
		}
	}
	for i, suite := range suites {
		var err error
		for f, rs := range byFamily {
			if rs[i] != nil && (has[f] || !s.V4 && !s.V6) {
				err = classify(rs[i])
			}
		}
		if err == nil {
			s.Suites = append(s.Suites, suite)
		} else {
			s.Missing = append(s.Missing, Missing{suite, err})
		}
	}
	s.Reason, s.err = s.summary(len(suites))
	return s
}

// summary words the result in one line.
func (s *Support) summary(all int) (string, error) {
	if len(s.Suites) == 0 {
		// The kernel looks for the algorithms before it looks for ESP, so one pair that got past them tells the most.
		err := s.Missing[0].Err
		for _, m := range s.Missing {
			if !errors.Is(m.Err, ErrNoAlgorithm) {
				err = m.Err
				break
			}
		}
		return err.Error(), err
	}
	families := "IPv4 and IPv6"
	if !s.V6 {
		families = "IPv4 only"
	} else if !s.V4 {
		families = "IPv6 only"
	}
	text := fmt.Sprintf("kernel ESP for %s, %d of %d algorithm pairs", families, len(s.Suites), all)
	if len(s.Missing) > 0 {
		var names []string
		for _, m := range s.Missing {
			names = append(names, m.Suite.String())
		}
		text += ", missing: " + strings.Join(names, ", ")
	}
	if !s.LargeWindow {
		text += ", replay window 32"
	}
	return text, nil
}

// classify gives an errno of socket or NEWSA its meaning.
func classify(err error) error {
	var why error
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		why = ErrPermission
	case errors.Is(err, unix.ENOSYS):
		why = ErrNoAlgorithm
	case isRefusal(err) && errors.Is(err, unix.EPROTONOSUPPORT):
		why = ErrNoESP
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		why = ErrNoXFRM // the socket itself
	default:
		return err
	}
	return fmt.Errorf("%w: %w", why, err)
}

func isRefusal(err error) bool {
	var k *KernelError
	return errors.As(err, &k)
}
