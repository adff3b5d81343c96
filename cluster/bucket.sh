#!/bin/sh
# AWS, once: create a bucket for studies and stores, and give the machines of cluster.yaml access to it. Run it after the
# first `ray up cluster.yaml`, which creates the head's role; that role can read and write buckets already.
#
#   sh cluster/bucket.sh BUCKET
set -eu
bucket=${1:?"usage: sh cluster/bucket.sh BUCKET"}

aws s3 mb "s3://$bucket"
# Workers may use this bucket and nothing else.
aws iam create-role --role-name tuner-worker --assume-role-policy-document '{"Version": "2012-10-17", "Statement": [
  {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]}'
aws iam put-role-policy --role-name tuner-worker --policy-name bucket --policy-document '{"Version": "2012-10-17", "Statement": [
  {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
   "Resource": ["arn:aws:s3:::'"$bucket"'", "arn:aws:s3:::'"$bucket"'/*"]}]}'
aws iam create-instance-profile --instance-profile-name tuner-worker
aws iam add-role-to-instance-profile --instance-profile-name tuner-worker --role-name tuner-worker
# The head starts the workers, so it must be allowed to give them their role.
aws iam put-role-policy --role-name ray-autoscaler-v1 --policy-name tuner-worker --policy-document '{"Version": "2012-10-17", "Statement": [
  {"Effect": "Allow", "Action": "iam:PassRole", "Resource": "arn:aws:iam::*:role/tuner-worker"}]}'
