import torch
def batches(samples,*,consumed_samples,micro_batch_size,global_batch_size,data_parallel_rank,data_parallel_size):
    i=consumed_samples
    per=micro_batch_size*data_parallel_size
    while i<len(samples):
        idx=[i+data_parallel_rank*micro_batch_size+j for j in range(micro_batch_size)]
        s=[samples[k] for k in idx]
        t=torch.stack([x["tokens"] for x in s]); l=torch.stack([x["labels"] for x in s])
        yield {"tokens":t,"labels":l,"loss_mask":torch.ones_like(t,dtype=torch.float),"position_ids":torch.arange(t.shape[1]).expand_as(t),"sample_index":torch.tensor(idx),"step":i//global_batch_size}
        i+=per
