from support.disk import SimDisk
from support.ledgers import open_store, push, queue, run, secret
from casemate.ledger import ledger, fsck, catalog
def test_life(): 
    disk=SimDisk()
    s=open_store(disk)
    d=push(s)
    j=queue(s,"1",(d,))
    run(s,j)
    assert ledger.job(s,j).state=="done"
    print(catalog.budget_state(s,d))
    r=fsck.check(s.all,recompute=True)
    assert not r.findings
    s.close()
    s=open_store(disk,2)
    print(s.head())
