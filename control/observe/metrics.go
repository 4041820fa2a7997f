package observe

import (
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Namespace is the prefix of every metric name.
const Namespace = "gmgate"

// Implementation constants.
const (
	// Native buckets grow by 10 %: enough to tell a p99 within that, at most 100 of them per histogram.
	nativeFactor     = 1.1
	nativeBuckets    = 100
	nativeResetAfter = time.Hour

	scrapesInFlight = 4
	scrapeTimeout   = 10 * time.Second

	unknown = "unknown" // label value of what is outside an enumeration
)

// Kind is the type of a metric added with AddFunc.
type Kind uint8

// Kinds.
const (
	Counter Kind = iota + 1 // only ever grows; the name ends in _total
	Gauge                   // goes up and down
)

// Metrics holds the counters of all workers and the metrics that are not a worker's. Make it with New.
type Metrics struct {
	workers    []*Counters
	extra      []prometheus.Collector
	registered bool

	registration prometheus.Histogram
	install      *prometheus.HistogramVec
	installErr   *prometheus.CounterVec
	unexpected   *prometheus.CounterVec
}

// New returns the metrics of a process with the given number of workers.
func New(workers int) *Metrics {
	m := &Metrics{
		registration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: Namespace, Name: "registration_duration_seconds",
			Help:                            "Time from the first REGISTER of a registration to its 200.",
			Buckets:                         []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
			NativeHistogramBucketFactor:     nativeFactor,
			NativeHistogramMaxBucketNumber:  nativeBuckets,
			NativeHistogramMinResetDuration: nativeResetAfter,
		}),
		install: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: Namespace, Name: "sa_install_duration_seconds",
			Help:                            "Time of one operation on an SA set in the ESP backend.",
			Buckets:                         []float64{1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, .001, .0025, .005, .01, .05, .1, 1},
			NativeHistogramBucketFactor:     nativeFactor,
			NativeHistogramMaxBucketNumber:  nativeBuckets,
			NativeHistogramMinResetDuration: nativeResetAfter,
		}, []string{"op"}),
		installErr: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: Namespace, Name: "sa_install_errors_total",
			Help: "Operations on SA sets that the ESP backend refused.",
		}, []string{"op", "errno"}),
		unexpected: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: Namespace, Name: "fsm_unexpected_events_total",
			Help: "Events for which a state machine has no transition; they change nothing.",
		}, []string{"fsm", "state", "event"}),
	}
	for range workers {
		m.workers = append(m.workers, new(Counters))
	}
	return m
}

// Worker returns the counters of worker i.
func (m *Metrics) Worker(i int) *Counters { return m.workers[i] }

// ObserveRegistration records how long a successful registration took. Safe for concurrent use.
func (m *Metrics) ObserveRegistration(d time.Duration) { m.registration.Observe(d.Seconds()) }

// ObserveInstall records one operation of the ESP backend: op is "install", "remove" or "extend". The errno label is
// the name of the syscall.Errno in err's chain, or "other". Safe for concurrent use.
func (m *Metrics) ObserveInstall(op string, d time.Duration, err error) {
	m.install.WithLabelValues(op).Observe(d.Seconds())
	if err != nil {
		m.installErr.WithLabelValues(op, errnoName(err)).Inc()
	}
}

// UnexpectedEvent counts an event for which a state machine has no transition. Safe for concurrent use.
func (m *Metrics) UnexpectedEvent(fsm, state, event string) {
	m.unexpected.WithLabelValues(fsm, state, event).Inc()
}

func errnoName(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		if name := unix.ErrnoName(errno); name != "" {
			return name
		}
	}
	return "other"
}

// BuildInfo adds gmgate_build_info, which is always 1. It is called before Register.
func (m *Metrics) BuildInfo(version, revision string) {
	m.AddFunc("build_info", "What this binary was built from.", Gauge,
		map[string]string{"version": version, "revision": revision, "goversion": runtime.Version()},
		func() float64 { return 1 })
}

// AddFunc adds a metric whose value f returns at each scrape, for what other packages count themselves. The name comes
// without the namespace; calls that share a name must share help, kind and the label names. f must be safe for
// concurrent use. AddFunc panics after Register.
func (m *Metrics) AddFunc(name, help string, kind Kind, labels map[string]string, f func() float64) {
	if m.registered {
		panic("observe: AddFunc after Register: " + name)
	}
	opts := prometheus.Opts{Namespace: Namespace, Name: name, Help: help, ConstLabels: labels}
	switch kind {
	case Counter:
		m.extra = append(m.extra, prometheus.NewCounterFunc(prometheus.CounterOpts(opts), f))
	case Gauge:
		m.extra = append(m.extra, prometheus.NewGaugeFunc(prometheus.GaugeOpts(opts), f))
	default:
		panic(fmt.Sprintf("observe: kind %d of %s", kind, name))
	}
}

// Register adds everything to r. The error joins all that r refused: bad names and duplicates.
func (m *Metrics) Register(r prometheus.Registerer) error {
	m.registered = true
	var errs []error
	add := func(c prometheus.Collector) {
		if err := r.Register(c); err != nil {
			errs = append(errs, fmt.Errorf("register metric: %w", err))
		}
	}
	add((*workerCollector)(m))
	add(m.registration)
	add(m.install)
	add(m.installErr)
	add(m.unexpected)
	for _, c := range m.extra {
		add(c)
	}
	return errors.Join(errs...)
}

// Handler serves what g gathers, for /metrics.
func Handler(g prometheus.Gatherer) http.Handler {
	return promhttp.HandlerFor(g, promhttp.HandlerOpts{
		EnableOpenMetrics:   true,
		MaxRequestsInFlight: scrapesInFlight,
		Timeout:             scrapeTimeout,
	})
}

// workerCollector adds up the counters of the workers at scrape time.
type workerCollector Metrics

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(Namespace, "", name), help, labels, nil)
}

var (
	messagesDesc = desc("sip_messages_total", "SIP messages received and sent.",
		"dir", "side", "method", "code_class", "transport")
	rejectedDesc      = desc("sip_rejected_total", "SIP requests answered with an error by gmgate itself.", "reason")
	droppedDesc       = desc("sip_drops_total", "SIP messages thrown away.", "reason")
	registrationsDesc = desc("registrations_total", "Registrations that ended.", "kind", "result")
	suitesDesc        = desc("secagree_selected_total", "Security agreements by algorithm pair.", "alg", "ealg")
	verifyDesc        = desc("security_verify_mismatch_total", "Security-Verify headers that differ from our Security-Server.")
	identityDesc      = desc("identity_mismatch_total", "Public identities that phones claimed without having registered them over their SA.")
	awaitAuthDesc     = desc("reg_await_auth_expired_total", "Challenges that no protected REGISTER answered in time.")
	repeatedDesc      = desc("sip_repeats_total", "SIP messages that came over TCP and were sent again over UDP for want of an answer.", "side")
	unrepeatedDesc    = desc("sip_repeats_refused_total", "SIP messages sent once instead, because too many wait for their answers.")
	setsDesc          = desc("sa_sets", "SA sets by phase.", "phase")
	associationsDesc  = desc("address_associations", "Phones registered in clear, without SAs.")
	uesDesc           = desc("ues", "UE contexts by registration state.", "state")
	spisDesc          = desc("spi_pool_in_use", "SPIs taken from the pool.")
	spiCapacityDesc   = desc("spi_pool_capacity", "SPIs that the pool can give out at most.")
)

var (
	regResults = [2]string{"failure", "success"}
	classNames = [classes]string{"request", "1xx", "2xx", "3xx", "4xx", "5xx", "6xx"}
)

// Describe implements prometheus.Collector.
func (w *workerCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		messagesDesc, rejectedDesc, droppedDesc, registrationsDesc, suitesDesc, verifyDesc, identityDesc, awaitAuthDesc, setsDesc, uesDesc,
		associationsDesc, repeatedDesc, unrepeatedDesc,
		subscriptionsDesc, subscribesDesc, notifiesDesc, networkDesc, lossesDesc,
		spisDesc, spiCapacityDesc,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector. Messages appear once they have been counted, since most combinations never
// occur; of the other metrics every series is there from the start, so that rates begin at zero.
func (w *workerCollector) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	w.collectMessages(counter)
	for r := range reasonEnd {
		rejected := w.sum(func(c *Counters) *count { return &c.rejected[r] })
		dropped := w.sum(func(c *Counters) *count { return &c.dropped[r] })
		if r != 0 || rejected != 0 {
			counter(rejectedDesc, rejected, name(r))
		}
		if r != 0 || dropped != 0 {
			counter(droppedDesc, dropped, name(r))
		}
	}
	for k := range regEnd {
		for i, result := range regResults {
			if n := w.sum(func(c *Counters) *count { return &c.registrations[k][i] }); k != 0 || n != 0 {
				counter(registrationsDesc, n, name(k), result)
			}
		}
	}
	for a := range ims.Alg(algs) {
		for e := range ims.EncAlg(encAlgs) {
			n := w.sum(func(c *Counters) *count { return &c.suites[a][e] })
			if n != 0 || (ims.Suite{Alg: a, Enc: e}).Legal() {
				counter(suitesDesc, n, name(a), name(e))
			}
		}
	}
	counter(verifyDesc, w.sum(func(c *Counters) *count { return &c.verify }))
	counter(identityDesc, w.sum(func(c *Counters) *count { return &c.identity }))
	counter(awaitAuthDesc, w.sum(func(c *Counters) *count { return &c.awaitAuth }))
	for s := range ims.Side(sides) {
		if n := w.sum(func(c *Counters) *count { return &c.repeated[s] }); s != 0 || n != 0 {
			counter(repeatedDesc, n, name(s))
		}
	}
	counter(unrepeatedDesc, w.sum(func(c *Counters) *count { return &c.unrepeated }))

	gauge := func(d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	gauge(associationsDesc, w.sumLevel(func(c *Counters) *level { return &c.associations }))
	for p := range phaseEnd {
		if n := w.sumLevel(func(c *Counters) *level { return &c.sets[p] }); p != 0 || n != 0 {
			gauge(setsDesc, n, name(p))
		}
	}
	for s := range ueEnd {
		if n := w.sumLevel(func(c *Counters) *level { return &c.ues[s] }); s != 0 || n != 0 {
			gauge(uesDesc, n, name(s))
		}
	}
	w.collectRegEvents(counter, gauge)
	gauge(spisDesc, w.sumLevel(func(c *Counters) *level { return &c.spisInUse }))
	gauge(spiCapacityDesc, w.sumLevel(func(c *Counters) *level { return &c.spiCapacity }))
}

func (w *workerCollector) collectMessages(counter func(*prometheus.Desc, uint64, ...string)) {
	for d := range dirEnd {
		for side := range ims.Side(sides) {
			for tr := range ims.Transport(transports) {
				for m := range sipmsg.Method(methods) {
					for class, className := range classNames {
						n := w.sum(func(c *Counters) *count { return &c.messages[d][side][tr][m][class] })
						if n != 0 {
							counter(messagesDesc, n, name(d), name(side), methodName(m), className, name(tr))
						}
					}
				}
			}
		}
	}
}

func (w *workerCollector) sum(f func(*Counters) *count) (n uint64) {
	for _, c := range w.workers {
		n += f(c).load()
	}
	return n
}

func (w *workerCollector) sumLevel(f func(*Counters) *level) (n int64) {
	for _, c := range w.workers {
		n += f(c).load()
	}
	return n
}

// name is the label value of an enumeration whose zero is no value.
func name[T interface {
	~uint8
	fmt.Stringer
}](v T) string {
	if v == 0 {
		return unknown
	}
	return v.String()
}

func methodName(m sipmsg.Method) string {
	if m == sipmsg.MethodOther {
		return "other" // a method name from the network would be a label without bound
	}
	return m.String()
}
