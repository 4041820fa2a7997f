package front
import ("testing";"net/netip";"net";"time";"fmt";"os";"strings";"golang.org/x/sys/unix")
func TestDbg(t *testing.T){
 for rep:=0; rep<300; rep++ {
  peers := []string{"2001:db8::2", "2001:db8::3", "2001:db8:0:1::4", "2001:db8::5"}
  ns := namespace(t, "2001:db8::1/128","2001:db8::2/128","2001:db8::3/128","2001:db8:0:1::4/128","2001:db8::5/128")
  l := gm(netip.MustParseAddrPort("[2001:db8::1]:0")); l.Hidden=true
  f, events := run(t, Config{Workers: 2, Listeners: []Listener{l}, Hidden: ns}, recorder{onMsg: echo})
  at := f.Listeners()[0].Addr
  _ = unix.SOL_SOCKET
  for pi, p := range peers {
   var c *net.UDPConn
   ns.Do(func() error { c = udpPeer(t, p, at); return nil })
   for i := range 20 {
     write(t,c,"MESSAGE sip:a SIP/2.0 ")
     for {
      var e event
      select { case e = <-events: case <-time.After(2*time.Second):
        s:=f.Stats()
        fmt.Printf("LOST rep %d peer %d msg %d stats %+v drops %v\n", rep,pi,i, s.Side(1), s.drops)
        ns.Do(func() error { b,_:=os.ReadFile("/proc/thread-self/net/snmp6"); for _,l:=range strings.Split(string(b),"\n"){ if strings.HasPrefix(l,"Udp6")||strings.HasPrefix(l,"Ip6In")||strings.HasPrefix(l,"Ip6Out"){ if !strings.HasSuffix(l,"\t0"){fmt.Println(l)}}}; b,_=os.ReadFile("/proc/thread-self/net/udp6"); fmt.Println(string(b)); return nil})
        write(t,c,"MESSAGE sip:again SIP/2.0 ")
        select { case e=<-events: fmt.Printf("then %q\n", e.msg); case <-time.After(2*time.Second): fmt.Println("nothing either") }
        t.FailNow()
      }
      if e.kind=="message" {break}
     }
     b:=make([]byte,100); if _,err:=c.Read(b); err!=nil {t.Fatal(err)}
   }
  }
  closeFront(t,f)
 }
}
